"""Words that no pool of keys has, by theme: what common words are drawn from, and what recall has as values."""

from __future__ import annotations

_WORDS = """
saucepan skillet colander ladle spatula whisk grater peeler corkscrew teaspoon tablespoon saucer tumbler pitcher
thermos toaster blender freezer dishcloth tablecloth breadcrumb pancetta porkchop meatball drumstick sirloin mutton
venison anchovy tuna lobster crab clam mussel caviar paella risotto ravioli lasagne gnocchi noodles dumpling pastry
strudel croissant bagel baguette cracker cookies brownie cupcake custard meringue sorbet nougat caramel marzipan
licorice popsicle lemonade cappuccino espresso smoothie milkshake champagne whiskey vermouth cognac brandy tequila
vinegar ketchup mayonnaise gravy chutney relish paprika oregano thyme coriander cumin cardamom turmeric fennel parsnip
lettuce arugula eggplant zucchini artichoke asparagus lentil chickpea soybean beetroot leek shallot avocado apricot
cranberry blackberry blueberry gooseberry tangerine grapefruit clementine kumquat lychee guava persimmon pomegranate
date hazelnut pistachio screwdriver wrench pliers crowbar handsaw hacksaw sander clamp anvil bellows plunger
stepladder toolbox workbench blowtorch sandpaper varnish plaster mortar cement rebar girder plank shingle rafter joist
banister doorknob hinges padlock latch doormat drainpipe gutters radiator thermostat boilers furnaces turbine piston
gearbox flywheel camshaft crankshaft sprocket ratchet pulley winch jackhammer forklift bulldozer excavator conveyor
generator transformer capacitor resistor transistor circuitry solder antennas amplifier loudspeaker microphone
headphones keyboard joystick touchscreen printer scanner projector trousers leggings overalls dungarees pullover
waistcoat blazer tuxedo raincoat overcoat anorak parka windbreaker nightgown pajamas bathrobe swimsuit petticoat
corset stockings garter suspenders necktie bowtie neckerchief bandana headscarf earmuffs mittens galoshes sneakers
slippers clogs moccasins stiletto shoelace buckles necklace earring pendant wristwatch handbag briefcase rucksack
suitcase electrician bricklayer glazier locksmith shoemaker tailor seamstress milliner weaver potter sculptor engraver
printmaker bookbinder librarian archivist curator journalist columnist novelist playwright composer violinist pianist
drummer bassist soprano tenor ballerina choreographer acrobat juggler magician ventriloquist puppeteer clown cameraman
stuntman announcer referee goalkeeper midfielder wrestler boxer fencer gymnast sprinter swimmer rower cyclist jockeys
mountaineer lifeguard firefighter paramedic surgeon midwife pharmacist optician chiropractor veterinarian zoologist
botanist geologist astronomer physicist chemist mathematician economist accountant auditor stockbroker insurer
solicitor barrister magistrate bailiff sheriff constable detective warden diplomat ambassador senator governor
councillor treasurer secretary receptionist typist janitor caretaker housekeeper chauffeur valet porter bellboy
waitress bartender brewer winemaker cheesemaker beekeeper shepherd ploughman milkmaid lumberjack gamekeeper fishmonger
butcher greengrocer florist hairdresser barber beautician skyscraper bungalows penthouse duplex farmhouse greenhouse
outhouse henhouse stable granary windowsill balustrade colonnade courtyard alleyway driveway footpath boulevard
crossroads roundabout overpass underpass viaduct aqueducts causeway embankment breakwater jetties dockyard shipyard
boathouse clubhouse courthouse firehouse schoolyard playground kindergarten gymnasium auditorium laboratory
observatory planetarium monastery convent cloister basilica minaret synagogue graveyard mausoleum crypt dungeon turret
drawbridge rampart battlement barracks armory peninsula archipelago headland promontory sandbank shoreline mudflat
marshland heathland moorland savannah steppe rainforest woodland hillside foothill ravine gully waterhole riverbank
rapids whirlpool undertow tidewater snowdrift snowflake hailstone raindrop rainbow sunrise twilight moonlight
starlight daybreak thunderclap lightning downpour mistral monsoon hurricane typhoon cyclone avalanche earthquake
landslide eruption aardvark alligator anteater antelope armadillo baboon bobcat chameleon cheetah chimpanzee
chinchilla chipmunk dachshund dingo dromedary ferret gerbil gibbon gorilla guinea hamster hedgehog hippopotamus iguana
kangaroo lemur manatee marmot meerkat mongoose narwhal ocelot opossum orangutan pangolin platypus porcupine porpoise
rattlesnake rhinoceros salamander skunk tapir tortoise wallaby warthog weevil wombat albatross blackbird budgerigar
buzzard cockatoo cuckoo flamingo goldfinch hummingbird kingfisher kestrel lapwing nuthatch oriole partridge parakeet
ptarmigan roadrunner sandpiper starling tern toucan woodpecker dragonfly grasshopper ladybird mosquito silkworm
termite wasps cockroach centipede tarantula jellyfish seahorse stingray barracuda piranha sturgeon chessboard dominoes
backgammon marbles hopscotch seesaw trampoline skateboard snowboard toboggan billiards snooker darts croquet badminton
volleyball handball lacrosse cricketer archery fencing judo karate triathlon decathlon marathon regatta steeplechase
accordion bagpipes bassoon castanets clavichord cymbal didgeridoo flugelhorn glockenspiel harmonica harpsichord oboe
ocarina piccolo saxophone sitar triangle ukulele vibraphone xylophone zither lullaby madrigal nocturne operetta
overture polka requiem serenade sonata symphony waltz airplane airliner helicopter hovercraft hydrofoil motorboat
catamaran trimaran tugboat lifeboat steamboat freighter tanker submarine locomotive carriageway tramway monorail
funicular caravans motorhome minibus ambulance limousine convertible hatchback motorcycle scooters tricycle unicycle
rickshaw wheelbarrow stagecoach parachute passport itinerary timetable luggage textbook workbook notepad clipboard
paperclip stapler highlighter ballpoint inkpad envelope postage stationery blackboard whiteboard protractor calculator
abacus dictionary thesaurus encyclopedia atlases almanac anthology biography memoir chronicle pamphlet brochure
leaflet newsletter magazines manuscript footnote appendix bibliography alphabet consonant vowel syllable adjective
pronoun algebra geometry trigonometry calculus arithmetic fraction decimal percentage logarithm polynomial parabola
hexagon pentagon octagon cylinder hemisphere diameter radius circumference mortgage dividend debenture invoice receipt
voucher coupon rebate surcharge overdraft
"""
WORDS = tuple(_WORDS.split())
