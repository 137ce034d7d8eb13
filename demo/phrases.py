"""Sentences for descriptions; `{m}` is the material, `{n}` the noun, `{c}` a shade, `{b}` the brand.

Only data; `demo.catalog` chooses among them.
"""

DETAILS: dict[str, tuple[str, ...]] = {
    "mug": (
        "The handle is wide enough for three fingers.",
        "Holds 330 ml, a proper breakfast portion.",
        "Fired twice, so the glaze does not craze.",
        "Keeps coffee warm a little longer than thin cups do.",
        "Stacks neatly with others of the series.",
    ),
    "teapot": (
        "Pours without a single drip.",
        "A fine strainer sits inside the spout.",
        "Enough for four cups, with a lid that stays on.",
        "The {m} holds its heat through a long conversation.",
        "The knob on the lid stays cool to the touch.",
    ),
    "bottle": (
        "Half a litre that fits into every bag and cup holder.",
        "Double walls keep water cold for a day.",
        "The cap closes with one turn and never leaks.",
        "Free of any taste of its own.",
        "Wide enough at the neck for ice cubes.",
    ),
    "T-shirt": (
        "Cut straight, with a round neck that keeps its shape.",
        "Soft {m} from the very first wearing.",
        "The shoulder seams are taped so that nothing scratches.",
        "Wash it at thirty degrees and forget the iron.",
        "A little longer at the back.",
    ),
    "jumper": (
        "Knitted from {m} with ribbed cuffs and hem.",
        "Warm without being bulky under a coat.",
        "The neck is close but never tight.",
        "Air it overnight instead of washing it.",
        "Fits true to size, with room for a shirt.",
    ),
    "dress": (
        "Falls to the knee and moves with every step.",
        "The waist is shaped, the skirt swings.",
        "Light {m} that does not cling on hot days.",
        "There are pockets in the side seams, of course.",
        "A hidden zip runs down the back.",
    ),
    "skirt": (
        "Flares gently from a fitted waistband.",
        "Lined to the hem so that it never rides up.",
        "The {m} creases little on a journey.",
        "Closes with a concealed zip at the side.",
        "Ends just above the knee.",
    ),
    "trousers": (
        "High in the waist and straight in the leg.",
        "Deep pockets that carry a phone without pulling.",
        "The {m} softens with every wash.",
        "Turn the hems up or leave them long.",
        "A touch of stretch makes them good for sitting.",
    ),
    "sneakers": (
        "The sole springs back with each step.",
        "Breathable {m} keeps feet dry.",
        "Flat laces that stay tied.",
        "Weighs under three hundred grams a shoe.",
        "The heel is padded where shoes usually rub.",
    ),
    "boots": (
        "The shaft ends above the ankle and holds it firmly.",
        "A grippy sole for wet leaves and cobblestones.",
        "Water beads off the {m}.",
        "Can be resoled, and should be, for many winters.",
        "Warmly lined without looking heavy.",
    ),
    "hat": (
        "The brim shades the face without hiding it.",
        "A ribbon runs around the crown.",
        "Rolls up for a suitcase and springs back.",
        "The {m} is light enough to forget.",
        "An inner band adjusts the size.",
    ),
    "scarf": (
        "Long enough to go around twice.",
        "The ends are finished with short fringes.",
        "Woven from {m} that never itches.",
        "Wear it loose, knotted or over the shoulders.",
        "Folds up small when the sun comes out.",
    ),
    "handbag": (
        "Room for a book, a purse and an umbrella.",
        "The strap can be carried in the hand or over the shoulder.",
        "A magnetic clasp closes by itself.",
        "The {m} grows more beautiful with use.",
        "Inside there is a pocket with a zip for keys.",
    ),
    "backpack": (
        "Holds a laptop, a jumper and lunch.",
        "Padded straps sit well on long days.",
        "The front pocket keeps small things at hand.",
        "Robust {m} that shrugs off a shower.",
        "Stands upright when it is put down.",
    ),
    "watch": (
        "Runs for five years on one battery.",
        "The dial is easy to read at a glance.",
        "The strap changes without any tool.",
        "Water does it no harm down to thirty metres.",
        "Slim enough to slip under a cuff.",
    ),
    "sunglasses": (
        "Lenses with full protection against ultraviolet light.",
        "Spring hinges that forgive being sat on once.",
        "The frame of {m} weighs next to nothing.",
        "Comes with a soft case.",
        "Sits firmly on narrow and wide noses.",
    ),
    "umbrella": (
        "Eight ribs keep it open in a gale.",
        "Wide enough for two who like each other.",
        "Opens at the push of a button.",
        "The curved handle hangs over an arm or a rail.",
        "The canopy of {m} dries within minutes.",
    ),
    "lamp": (
        "Throws a warm circle of light on the table.",
        "The shade softens even a bright bulb.",
        "A switch hangs on the cord where the hand finds it.",
        "Stands firmly on its round foot.",
        "Takes an ordinary E27 bulb.",
    ),
    "armchair": (
        "Deep enough to pull the legs up.",
        "Turned wooden legs carry a solid frame.",
        "Covered in {m} that is pleasant on bare arms.",
        "The armrests are broad enough for a cup.",
        "The seat cushion can be turned over.",
    ),
    "sofa": (
        "Two people sit on it, one can sleep.",
        "The cushions keep their shape for years.",
        "Covered in hard-wearing {m}.",
        "Passes through narrow doors when its legs are off.",
        "The back is finished, so it can stand in the room.",
    ),
    "vase": (
        "Looks good with a single branch, too.",
        "The narrow neck keeps stems together.",
        "Thrown from {m} and glazed inside and out.",
        "Heavy enough not to tip over.",
        "Tall enough for tulips and sunflowers.",
    ),
    "potted plant": (
        "Asks for water once a week and little else.",
        "Thrives in half shade.",
        "The {m} pot comes with a saucer.",
        "New leaves unroll all year round.",
        "Cleans the air and forgives neglect.",
    ),
    "cushion": (
        "Filled with feathers that plump up again.",
        "The cover of {m} comes off for washing.",
        "Forty-five centimetres square.",
        "Makes an old sofa look new.",
        "A concealed zip leaves all four edges smooth.",
    ),
    "clock": (
        "Its movement makes no sound at all.",
        "The hands are easy to read from across a room.",
        "A case of {m} frames the dial.",
        "Hangs from a single nail.",
        "Gains less than a second a day.",
    ),
    "bicycle": (
        "Eight gears are enough for every hill in town.",
        "The {m} frame is light to carry upstairs.",
        "Lights run from the hub and never need charging.",
        "An upright seat gives a good view of traffic.",
        "Wide tyres roll over cobblestones.",
    ),
}

STYLE_LINES: dict[str, tuple[str, ...]] = {
    "minimalist": (
        "Nothing is here that does not need to be.",
        "Clean lines and no logo.",
        "Reduced to the essential by {b}.",
        "A quiet, minimalist design.",
        "Pared back and calm.",
    ),
    "vintage": (
        "A shape that grandparents would recognise.",
        "After a pattern book of the nineteen-fifties.",
        "With the vintage charm of a flea market find.",
        "Retro in looks, new in every seam.",
        "{b} has made it nearly unchanged for decades.",
    ),
    "sporty": (
        "Made for people who take the stairs.",
        "Sporty, light and ready to go.",
        "Borrowed from the athletics track.",
        "For active days from the first run to the last train.",
        "Tested on the move by {b}.",
    ),
    "bohemian": (
        "A free-spirited piece for collectors of colours.",
        "Boho through and through.",
        "Inspired by markets in the south.",
        "Looks as if it came back from a long journey.",
        "Bohemian in mood, no two are quite alike.",
    ),
    "elegant": (
        "Elegant enough for an evening out.",
        "Refined down to the gilded details.",
        "A classic of quiet luxury from {b}.",
        "For those who dress with care.",
        "Graceful and finely made.",
    ),
    "playful": (
        "It makes children laugh and grown-ups, too.",
        "Cheerful and a bit silly, on purpose.",
        "Playful design from {b}.",
        "Good humour to touch.",
        "Fun in every corner.",
    ),
    "rustic": (
        "Honest country style, made to be used.",
        "Rustic and sturdy like a farmhouse table.",
        "Made slowly in a small workshop.",
        "For kitchens that smell of bread and halls full of boots.",
        "A homely piece by {b}.",
    ),
}

PATTERN_LINES: dict[str, tuple[str, ...]] = {
    "plain": ("In plain {c}.", "A single, even {c}.", "Solid {c} all over.", "{C}, without any pattern."),
    "striped": (
        "With stripes on {c}.",
        "{C} with even stripes.",
        "Striped in the manner of sailors, on {c}.",
    ),
    "dotted": ("Polka dots on {c}.", "{C}, scattered with dots.", "Dotted all over on a {c} ground."),
    "checked": ("Checked, on {c}.", "A gingham check in {c}.", "{C} with a tidy check."),
    "floral": ("Flowers on a {c} ground.", "{C}, strewn with blossoms.", "A floral print over {c}."),
    "zigzag": ("Zigzag lines across {c}.", "{C} with a bold zigzag.", "A chevron pattern on {c}."),
    "wavy": ("Soft waves run over {c}.", "{C} with a pattern of waves.", "Wavy lines on {c}."),
    "starry": ("Little stars on {c}.", "{C}, sprinkled with stars.", "A starry print on {c}."),
}

PATTERN_WORDS: dict[str, tuple[str, ...]] = {
    "plain": ("",),
    "striped": ("striped", "stripy"),
    "dotted": ("dotted", "polka-dot", "spotted"),
    "checked": ("checked", "gingham"),
    "floral": ("floral", "flowered"),
    "zigzag": ("zigzag", "chevron"),
    "wavy": ("wavy", "wave-patterned"),
    "starry": ("starry", "star-print"),
}

OPENINGS = (
    "A {n} in {m}.",
    "This {n} is made of {m}.",
    "{M}, carefully worked by {b}.",
    "From {b}: a {n} of {m}.",
    "Our favourite {n} of the season, in {m}.",
    "A {n} for every day.",
    "The {n} that people ask us about most.",
)

PLURAL_OPENINGS = (
    "{N} in {m}.",
    "These {n} are made of {m}.",
    "{M}, carefully worked by {b}.",
    "From {b}: {n} of {m}.",
    "Our favourite {n} of the season, in {m}.",
    "{N} for every day.",
    "The {n} that people ask us about most.",
)

CLOSINGS = (
    "A good present.",
    "Easy to combine.",
    "Sent in a box without plastic.",
    "Also lovely as a gift for someone who has everything.",
    "Repairs are free for two years.",
    "",
    "",
    "",
)

MODELS = (  # noqa: SIM905 - a list of words is easier to read as text
    "Alma Bruno Clio Dara Edda Finn Greta Hugo Ines Jona Kaja Lino Mira Nico Olga Pia Quin Rosa Sven Tilda "
    "Ugo Vera Wim Xenia Yara Zeno Aspen Birch Cedar Delta Ember Flint Grove Harbour Isle Juniper Kite Lark "
    "Meadow Nimbus Orchard Pebble Quill River Sage Thistle Umber Vale Willow Yarrow Arlo Bonnie Casper Dotty"
).split()
