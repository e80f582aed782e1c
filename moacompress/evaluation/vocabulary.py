"""English words that no pool of keys has: what common words are drawn from, and what recall has as values."""

from __future__ import annotations

_WORDS = """
absence academy accent accident account acid acre action actor advice affair agency agenda agree airport alarm album
alcohol alley alliance allow amount angel anger angle animal ankle answer apartment appear appetite argue armor army
arrange arrest arrive artist aspect assist athlete attack attempt attend attic auction audience author autograph avenue
average avoid award bacon baggage bakery balance balcony ballot bamboo banana banner bargain barrel baseball basement
battery battle beach beard beauty become bedroom begin behave belief belong bench benefit berry beside between beyond
birthday biscuit blade blame blood blossom board boast body bomb bone bonus book boot border borrow boss bother bottom
boundary bowl brain branch brand bread break breath breeze brick bride broker brother brush bubble budget buffalo build
bullet bundle burden burger burn business butter cabbage cable cactus cake calcium calendar call campaign cancel capital
captain carbon career cargo carpenter carriage carrot carry cartoon cash casual cattle cause ceiling celery cement
census central ceramic certain chain chair chamber champion chance change chapter charge chart cheese chef cherry chess
chest chicken chief child chocolate choice choose church cinema circle citizen civil claim class clay clean clerk client
climb clinic close cloth clothes club coach coal coast coffee coin collar collect college color column combine comedy
comfort command comment common company compare compass complain computer concert conduct confirm connect consider
contain contest control cook copy coral corn corner correct cost cotton couch council count country couple course court
cousin cover crack craft cream create credit crew cricket crime crisis crop cross crowd crown cruise crystal culture
cupboard current curve custom customer cycle damage dance danger daughter dealer debate debt decade decide decision
declare degree delay deliver demand dentist depend deposit describe design desire desk detail device dialog diary
dictate differ dinner direct disagree discover disease dish disk display divide doctor document dollar domain door
double doubt draft drama drawer dream dress drink drive driver drop duck dust duty earn earth easy echo edge editor
educate effect effort elbow elect element elephant elevator emotion employ empty enable energy engage engineer enjoy
enough ensure enter entire entry envelope equal error escape essay estate evening event evidence exact exam example
exchange excite exercise exist exit expand expect expert explain export express extend fabric face fact factor factory
fade fail faith fall family farm farmer fashion father fault favor fear feature federal feed feel fence festival fever
fiction field fight figure file film filter final finance find finger finish fire firm fish fitness flag flame flavor
fleet flight float flood floor flour flow flower focus fold follow food foot force forget fork form fortune forum
forward fossil foster frame freedom freeze friend fringe frog front frost fruit fuel function fund funeral furniture
future gain gallery game garage garlic gate gather gauge gender general genius gesture ghost gift ginger girl give glad
glance glass globe glory glove goal goat goddess govern grab grace grade grain grammar grandma grape grass gravity great
green grid grief grill grocery ground group grow growth guard guess guest guide guilt habit hair half hall hand handle
happen hardware harvest hate head health heart heat heaven height help herb hero hide high hill hire history hobby hold
hole holiday home honey hook hope horn horse hospital host hour house human humor hundred hunt hurry husband idea
identify image imagine impact import improve inch include income increase index industry infant inform initial injury
insect inside inspect install insult intend interest invest invite iron issue item ivory jazz jeans jelly jewel join
joke journal journey judge juice jump junior jury justice keep kidney kingdom kiss knee knife knock knot know label
labor lake lamp land language laptop laugh laundry lawn lawyer layer lead leader leaf league learn leather leave lecture
left legend lesson letter level library license life lift limit line link lion liquid list listen little live load loan
lobby local lock logic look lord lose loss love lunch lung machine magazine mail main maintain major make manage manner
manual march margin mark marriage mask mass master match material matter maximum mayor meal measure meat media medicine
meet melody member memory mention menu merchant mercy message metal method middle midnight mile military milk mind mine
minister minor minute miss mission mistake mixture mobile model moment money monitor monkey month monument mood morning
mother motion motor mouse mouth move movie muscle mushroom music mutual mystery nail name nation nature neck neighbor
nephew nerve nest network neutral news night noise noodle normal nose notebook nothing notice novel nuclear number nurse
object observe obtain occur ocean offer office officer often olympic onion open opera opinion oppose option orange order
organ origin outfit outside oven owner oxygen package page pain paint pair paper parade parent park parking part partner
party pass passage passion past pasta path pattern pause payment peace peanut pension people percent perfect perform
perfume period permit person phone photo phrase physics piano picture piece pillar pilot pioneer pipe pitch pizza place
plan plant plastic plate play player please pledge plenty plot plug plus poem poet point poison police policy polish
pool popcorn portion position potato pottery powder power practice praise predict prefer prepare present press pretty
prevent price pride priest primary prince print prison private prize problem process produce profit program project
promise proof property protect protein provide public pudding pull pulse pump punch pupil purchase purple purpose push
quality quantity quarter queen question queue quote race radar radio rail rain raise ramp random range rate ratio reach
react reader reason rebel recall receive recipe record reduce reflect reform refuse region regret regular reject relate
relax release rely remain remember remind remote remove render rent repair repeat reply report request rescue research
resist resource respond rest result retire return reveal review reward rhythm rice ride right ring rise risk ritual road
robot rock role roof room root rope rose round route routine rubber rule runner rural salad salary salmon salt sample
sand satisfy sauce sausage save scale scene schedule scheme scholar school science scissors score screen script search
season seat second secretary section sector secure select senior sense sentence series servant service session settle
setup shade shame shape share shark sheep sheet shelf shell shelter shift shine ship shirt shock shoe shoot shop short
shoulder shout show shower shrimp sibling side sign signal silk sister site situation size skate skill skin skirt sleep
slice slide slogan smile smoke snack snake snow soap soccer social sock soft software soldier solution solve song sort
soul sound soup source south space spare speak special speech speed spell spend spice spin spirit split sponsor spoon
sport spot spray spread spring square stable stadium staff stage stair stamp stand staple star start state statue stay
steak steam steel stem step stick still stock stomach stone stool stop store story stove strategy stream street stress
strike string stripe strong student studio study stuff style subject submit suburb success sudden suffer sugar suggest
suit summer supply support surface surgery surprise surround survey suspect sustain sweater sweet swim swing switch
symbol symptom syrup system table tackle tail talent talk tank tape target task taste teach teacher team tear technique
teenager tell tennis tent term test text thank theater theme theory thick thing think thought thread threat throat throw
thumb ticket tile time tissue title toast tobacco today together toilet token tomato tone tongue tool tooth topic torch
total touch tourist towel tower town track trade traffic tragedy train transfer trap travel tray treat tree trend trial
tribe trick trip trophy trouble truck true trust truth tube tuition tune twin twist type typical umbrella uncle under
uniform union unit universe update upper urban usual vacation vacuum valid value vanilla variety vast vehicle vendor
venture verb version vessel veteran victim victory video view village vintage virus visit visual vital vitamin voice
volume vote voyage wage wait walk wall wallet want warfare warning wash waste watch water wave wealth weapon wear
weather wedding week weekend weight welcome west wheat wheel whisper whole wife wing winner wire wisdom wish witness
woman wonder wood wool word work worker world worry wound wrap wrist write yard year yellow yogurt youth zebra zero zone
"""
WORDS = tuple(_WORDS.split())
