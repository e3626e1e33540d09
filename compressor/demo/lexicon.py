"""The closed vocabulary of the demo domain: every list is data, and any word may meet any other."""

NAMES = (
    "Mara Tom Ines Otto Lena Hugo Nora Felix Ada Bruno Clara Emil Frida Hanna Ivan Jana Karl Lotte Nils Olga Paul Rosa "
    "Sven Uma"
).split()
TOWNS = (
    "Oslo Lund Bergen Turku Riga Tartu Vilnius Gdansk Lyon Porto Siena Graz Basel Ghent Delft Cork York Leeds Kiel Pisa"
).split()
NOUNS = (
    "lamp river stone boat garden window bridge candle forest ladder mirror pencil basket hammer island kettle needle "
    "orange puzzle rocket umbrella village anchor engine hat jacket key nest"
).split()
ADJECTIVES = "old bright quiet heavy small round warm cold clean strange broken narrow plain golden deep tall".split()
ANIMALS = "cat dog goat horse rabbit parrot turtle mouse hen goose sheep fox".split()
FOODS = "soup bread cheese apples honey rice fish plums beans carrots cake nuts".split()
JOBS = "baker sailor teacher farmer painter doctor miller singer pilot tailor cook writer".split()
INSTRUMENTS = "piano violin flute guitar trumpet cello harp organ".split()
COLOURS = "red blue green yellow white black brown pink".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()

# Role-play: what a persona can be told to open with, to close with, and to call the user.
OPENINGS = "Ahoy Greetings Hark Behold Howdy Welcome Aye Hurrah".split()
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
ADDRESSES = "captain friend traveller comrade neighbour professor majesty champion".split()

ALL = sorted(
    {*NAMES, *TOWNS, *NOUNS, *ADJECTIVES, *ANIMALS, *FOODS, *JOBS, *INSTRUMENTS, *COLOURS, *DAYS, *OPENINGS, *ADDRESSES}
    | {word for closing in CLOSINGS for word in closing.split()}
)
