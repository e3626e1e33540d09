"""The closed vocabulary of the demo domain: every list is data, and any word may meet any other."""

NAMES = ["Mara", "Tom", "Ines", "Otto", "Lena", "Hugo", "Nora", "Felix", "Ada", "Bruno", "Clara", "Emil", "Frida", "Gus", "Hanna", "Ivan", "Jana", "Karl", "Lotte", "Max", "Nils", "Olga", "Paul", "Rosa", "Sven", "Tilda", "Uma", "Viktor", "Wanda", "Yara", "Zeno", "Anton", "Berta", "Carl", "Dora", "Erik"]

TOWNS = ["Oslo", "Lund", "Bergen", "Turku", "Riga", "Tartu", "Vilnius", "Gdansk", "Lyon", "Porto", "Siena", "Graz", "Basel", "Ghent", "Delft", "Cork", "York", "Leeds", "Bath", "Derby", "Malmo", "Aarhus", "Narvik", "Kiel", "Bremen", "Trier", "Como", "Pisa", "Nice", "Lille"]

NOUNS = ["lamp", "river", "stone", "boat", "garden", "window", "bridge", "candle", "forest", "ladder", "mirror", "pencil", "basket", "hammer", "island", "kettle", "blanket", "needle", "orange", "puzzle", "rocket", "saddle", "ticket", "umbrella", "village", "wagon", "anchor", "bottle", "carpet", "drum", "engine", "feather", "glove", "hat", "ink", "jacket", "key", "leaf", "map", "nest"]

ADJECTIVES = ["old", "bright", "quiet", "heavy", "small", "round", "warm", "cold", "clean", "strange", "smooth", "broken", "narrow", "gentle", "plain", "golden", "deep", "empty", "soft", "tall"]

ANIMALS = ["cat", "dog", "goat", "horse", "rabbit", "parrot", "turtle", "hen", "mouse", "owl", "pony", "goose", "donkey", "sheep", "duck", "fox"]
FOODS = ["soup", "bread", "cheese", "apples", "honey", "rice", "fish", "pancakes", "plums", "beans", "carrots", "cake", "noodles", "pears", "toast", "nuts"]
JOBS = ["baker", "sailor", "teacher", "farmer", "painter", "doctor", "miller", "singer", "pilot", "tailor", "smith", "gardener", "cook", "writer"]
INSTRUMENTS = ["piano", "violin", "flute", "guitar", "trumpet", "cello", "harp", "organ", "banjo", "tuba"]
COLOURS = ["red", "blue", "green", "yellow", "white", "black", "brown", "pink", "grey", "purple"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]

# Role-play: what a persona can be told to open with, to close with, and to call the user.
OPENINGS = ["Ahoy", "Greetings", "Hark", "Behold", "Howdy", "Salute", "Welcome", "Aye", "Bonjour", "Hurrah"]
CLOSINGS = (
    "by the stars",
    "on my honour",
    "as the wind blows",
    "so it goes",
    "upon my word",
    "under the moon",
    "for the crown",
    "come what may",
)
ADDRESSES = ["captain", "friend", "traveller", "comrade", "neighbour", "professor", "majesty", "champion"]

ALL = sorted(
    {
        *NAMES,
        *TOWNS,
        *NOUNS,
        *ADJECTIVES,
        *ANIMALS,
        *FOODS,
        *JOBS,
        *INSTRUMENTS,
        *COLOURS,
        *DAYS,
        *OPENINGS,
        *ADDRESSES,
    }
    | {word for closing in CLOSINGS for word in closing.split()}
)
