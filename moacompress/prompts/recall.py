"""Associative recall in the manner of MQAR (Zoology, arXiv 2312.04927): pairs of words, then one key once more.

The text goes to the model as it is, without instructions or chat template, so that base models and tiny trained ones
can do it too. Keys come from a split's pool. The words below are the values of calibration (every other one) and of
validation; evaluation has a list of its own that shares none with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moacompress.prompts.pools import KEYS_PER_SPLIT, SPLITS, Split, draw_keys

_WORDS = """
abbey acorn adhesive admiral adobe aerial afternoon airfield alabaster alcove almond alpine altar aluminum amateur
amulet antenna antique apron aquarium archer archive armchair aroma arsenal artisan asphalt aster atlas atrium awning
axle backpack badger baker ballad ballet balsam banjo banquet barley barometer baron bathtub bayou beaver beehive
beetle beret binder birch bison blacksmith blizzard blouse bluebell boiler bonfire bonnet bookcase boulder bouquet
bracelet bramble brewery broccoli brooch broth buckle bugle bulb bungalow burrow butler buttercup camera canary canoe
canvas caravan cardigan caribou cashew cathedral cauldron cedar cellar cello chalk chapel charcoal chariot checkers
chestnut chisel cider cinnamon clarinet cliff clover cobbler coconut colony commuter concierge condor conductor cookie
copse cormorant cornflower cove coyote cradle crane crater creek crocus crow cruet cucumber cushion cutlery cypress
daffodil dagger dairy daisy deacon decoy deli delta denim detour dinghy diver dock dome doorbell doorway dormouse
drizzle drone druid dune dwarf easel eclipse eel elm ember emerald emperor eraser estuary fable faucet fawn fern fiord
fisher flannel flask flint flute foal foundry foyer freckle frigate fudge furnace gable gadget galley gardener
gargoyle gazelle geyser gherkin ginkgo giraffe glider gnome goblet gondola gopher gorge granite gravel greyhound
grotto gutter gypsum haddock halibut halo hamlet hammock harp hatchet hawk hay hearth hedge heron herring hickory
hinge hive holly hood hornet hostel hub hydrant hyena icicle igloo inkwell inlet isthmus ivy jackal jasmine jay jetty
jigsaw jockey juniper kale kayak kelp kennel kernel keyhole kimono kiosk kite kiwi koala lace lacquer larder lark
lasagna lather lattice laurel lava leopard lever lilac lily linen llama locket locust loft loom lotus lute lynx
macaroni mackerel magpie mailbox mallard mandolin mango mantle marble marigold marina marmalade marsh mast mayfly
melon mercury mermaid meteor millet mitten moat mole monk moose mop mosaic moss moth mound muffin mulberry mule mural
mustard napkin nectar nettle newt nickel nightingale nutmeg oak oar oatmeal obelisk octopus omelet onyx opal orchid
ostrich owl paddock pagoda pancake papaya parchment parsley pasture patio peach peacock pear pearl pelican penguin
peony petal pewter pheasant pickle pier pigeon pine plateau plum plumber plywood poncho pony poppy porch porridge
postcard prawn pretzel primrose prism puffin pumpkin puppet pyramid quail quarry quartz quill quilt raccoon radish
raft raisin ranch raspberry reef reindeer reservoir rhubarb rivet robin rosemary ruby rudder rye saffron sage sandal
sapling sapphire sardine satchel sawmill scallop scarf schooner scooter seagull seaweed shale shamrock shawl sherbet
shrub silo skylark sleigh sloth snail sofa sorrel spaniel sparrow spinach spindle spire sponge spruce squash squid
stallion starfish stork strawberry sundial swallow swan tabby tambourine tapestry tassel teapot telescope terrace
thicket thimble thistle thrush tinsel toad toffee topaz trellis trombone trout trowel trumpet tuba tulip tundra turban
turnip turquoise twig umpire urn valve vase vat verandah vicar vine viola violet vulture waffle walrus wand warbler
wasp waterfall weasel whisker willow windmill wolf wren yacht yam yeast yolk zeppelin zinc zipper
"""
WORDS: dict[Split, tuple[str, ...]] = {split: tuple(_WORDS.split()[index::2]) for index, split in enumerate(SPLITS[:2])}


@dataclass(frozen=True)
class Recall:
    """Words for one prompt of any size.

    Attributes:
        asked: the key asked for.
        value: its value, which no other key has.
        keys: the other keys.
        values: the other values; they repeat where there are more keys.
        depth: where among the pairs the one asked for stands, 0 to 1.
    """

    asked: str
    value: str
    keys: tuple[str, ...]
    values: tuple[str, ...]
    depth: float

    @staticmethod
    def draw(rng: np.random.Generator, split: Split, most: int, words: Sequence[str]) -> Recall:
        """Draws the words of a prompt with fewer than `KEYS_PER_SPLIT` other keys, which are of the split's pool."""
        asked, *keys = draw_keys(rng, split, most + 1)
        value, *values = [words[index] for index in rng.permutation(len(words)).tolist()]
        return Recall(asked, value, tuple(keys), tuple(values), float(rng.random()))

    def pairs(self, count: int) -> list[tuple[str, str]]:
        """Returns the pair asked for among `count` others."""
        pairs = [(key, self.values[index % len(self.values)]) for index, key in enumerate(self.keys[:count])]
        pairs.insert(round(self.depth * count), (self.asked, self.value))
        return pairs


def most_pairs(length: int) -> int:
    """Returns how many other pairs a prompt of `length` tokens may need, as far as there are keys."""
    return min(length, KEYS_PER_SPLIT) - 1


def pairs_text(pairs: Sequence[tuple[str, str]]) -> str:
    """Returns one line for each pair."""
    return "".join(f"{key}: {word}\n" for key, word in pairs)


def question(asked: str) -> str:
    """Returns the last line, which the value follows."""
    return f"{asked}:"
