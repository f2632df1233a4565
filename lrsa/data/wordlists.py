"""Words of the synthetic tasks: keys of needles, and the built-in haystack. A small vocabulary covers them all."""

from __future__ import annotations

ADJECTIVES = """
ancient autumn bitter blue bold brave bright broken calm clever cold cool crimson curious dark deep dusty eager early
empty faint fancy fierce flat fresh frosty gentle giant golden grand green grey happy hidden hollow humble icy ivory
jolly keen kind large late lazy light lively lonely loud lucky mellow mighty misty modest narrow noble odd old orange
pale patient plain polite proud purple quick quiet rapid rare red restless rough round royal rusty scarlet sharp shiny
shy silent silver simple sleepy slow small smooth soft solid spicy steady still strange stubborn sturdy sunny sweet
swift tall tame tidy tiny upper vivid warm weary white wide wild winter wise yellow young
""".split()  # noqa: SIM905

NOUNS = """
acorn amber anchor apple arrow badge bamboo banner barrel basil basket beacon bell berry blade blossom boat bottle
branch bridge bronze brook bucket butter button cabin cactus camel candle canyon carpet castle cedar cherry circle
clay cliff clock cloud clover cobalt comet copper coral cotton crane crown crystal daisy desert diamond dolphin dragon
drum eagle ember engine falcon feather fern flame flute forest fossil fountain fox garnet ginger glacier globe granite
guitar hammer harbor harp hazel helmet heron honey iris island ivy jacket jaguar jasmine jewel kettle kite ladder lake
lantern laurel lemon lily lion lotus magnet maple marble meadow melon mint mirror moss mountain needle nickel nutmeg
oak oasis ocean olive onyx opal orbit orchid otter oyster paddle palace panda paper parrot peach pearl pebble pepper
pigeon pillow pine planet plum pocket pony prism pumpkin quartz quill rabbit raven ribbon ridge river rocket rose
ruby saddle saffron sail salmon sapphire shadow shell shield spider spruce statue stone storm summit sunset swan
tiger timber topaz torch tower tulip tunnel turtle umbrella valley velvet violet violin walnut whale willow window
wolf zebra zephyr
""".split()  # noqa: SIM905

# Plain statements without numbers, keys or questions, so that nothing in the haystack answers a needle's question.
HAYSTACK = (
    "The grass grows in the field.",
    "The sky is clear today.",
    "The sun shines on the hill.",
    "Here we go again.",
    "There and back again.",
    "People walk along the road every day.",
    "The children play near the house.",
    "A man sits at the table and reads.",
    "She opens the door and looks outside.",
    "He drinks tea in the morning.",
    "The train leaves the station on time.",
    "We wait for the bus by the park.",
    "Rain falls on the roof at night.",
    "The wind moves the trees.",
    "They talk about the weather.",
    "A dog sleeps under the table.",
    "The cat watches the birds.",
    "The teacher writes on the board.",
    "The shop opens in the morning and closes at night.",
    "Some people like music and others like books.",
    "The farmer works in the field all day.",
    "A letter came with the post today.",
    "The street is busy before noon.",
    "My friend cooks dinner for the family.",
    "The town has a market near the church.",
    "Water runs down the hill.",
    "They build a house by the road.",
    "The bread is on the table.",
    "We walk home after work.",
    "The night comes and the town sleeps.",
    "She sings a song for the children.",
    "He tells a story about the sea.",
    "The boys run to school.",
    "The girls write letters to a friend.",
    "Snow lies on the ground.",
    "A car stops before the shop.",
    "The days go by and nothing changes.",
    "He works in the garden after dinner.",
    "The family eats together every night.",
    "The road goes down to the sea.",
    "The man at the station sells books.",
    "The birds sing in the morning.",
    "We look at the sky and talk.",
    "The weather changes every day.",
    "Others wait at the door.",
    "The church stands on the hill.",
    "Nothing moves in the street at noon.",
    "My family likes the park.",
)

# RULER's repeated haystack (Hsieh et al. 2024), one line of it.
REPEATED_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

# Words that say little by themselves: a name does not begin with one, nor is one asked for as a rare word.
FUNCTION_WORDS = frozenset(
    """
a about above after again against all almost along already also although always am among an and another any are around
as at away back be became because become been before began behind being below between both but by called came can cannot
come could did do does done down during each either else ever every few first for from gave get give given go had has
have having he hence her here hers him himself his how however i if in indeed into is it its itself just last later
least less like made make many may me might more most much must my myself near neither never next no nor not nothing
now of off often on once one only or other others our out over own perhaps rather said same say says see seen several
shall she should since so some something soon still such than that the their them themselves then there therefore these
they thing things this those though through thus till to together too toward towards two under until up upon us used
usually very was we well went were what when where whether which while who whole whom whose why will with within without
would yes yet you your
""".split()  # noqa: SIM905
)
