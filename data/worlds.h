// What the built-in stories are made of: ten worlds, the words that they share, and fourteen plots.
// Gives: the tables `worlds`, `everywhere`, `plots` and `tables`, which names their columns. Needs: nothing.
// data/stories.c tells stories from them, and dev/test/check_stories.c reads stories back. To add a world or a plot,
// add a row; no code changes.
#pragma once

// ---------------------------------------------------------------------------------------------------------------
// How the tables are written
//
// A plot is a text with marks that the program replaces:
//
//   {toy}     a row of the world's TOY table; {toy2} is another row of it, {toy3} a third. {Toy} starts with a capital.
//   {name2}   in tables of people the number is the person's: 1 (left out) the hero, 2 the friend, 3 the elder, 4 the
//             parent. Each is a boy or a girl all through the story, and {he2} {him2} {his2} follow.
//   [a|b|c]   one of these; a choice may be empty, and may contain marks and other choices.
//   @         "a" or "an", as the next word wants it.
//
// A row has columns, divided by '/', for things that belong together: what happens to a toy, why nobody can reach it,
// the tool that can, and how. Columns have names of their own, and {fell} {toofar} {tool} {used} without a number
// all come from one row, so the tool always fits the trouble. A row may contain marks like a plot.
// ---------------------------------------------------------------------------------------------------------------

// clang-format off
enum {
    NAME, KIND, ELDER, PARENT, HE, HIM, HIS,                                 // people
    HOME, HOBBY, GO, TOY, PLACE, FOOD, STRANGER, LAMP, LURE, MARK, STRONG,   // what a world has
    REACH, TRAP, NOISE, SKILL, PRECIOUS, WEAK, STORM, SHELTER, CRY,          // what can happen in it
    TRAIT, COLOUR, BUILDING, DAY, OPENING, JOY, CLOSING,                     // the same in every world
    TABLES
};

enum { PEOPLE = 4, MAX_ROWS = 10, NAMES = 2 }; // NAMES: rows of names that each world has

// The names of each table's columns. In tables of people the columns are the boy's form and the girl's form of one
// word (if they differ), so such a table has one name.
static const struct {
    const char *columns;
    int people;
} tables[TABLES] = {
    [NAME] = {"name", 1}, [KIND] = {"kind", 1}, [ELDER] = {"elder", 1}, [PARENT] = {"parent", 1},
    [HE] = {"he", 1}, [HIM] = {"him", 1}, [HIS] = {"his", 1},
    [HOME] = {"home", 0},                          // "lived in the warm blue sea"
    [HOBBY] = {"hobby hobbied", 0},                // "loved to chase bubbles"; "chased bubbles"
    [GO] = {"went", 0},                            // how one moves here: swam, ran, flew
    [TOY] = {"toy", 0},                            // small, can be carried, and can have any colour
    [PLACE] = {"place", 0},                        // one can sit there, and a thing can lie there; at least 3
    [FOOD] = {"food", 0},                          // goes with "some" and with "a bowl of"; at least 5
    [STRANGER] = {"stranger", 0},                  // someone tiny
    [LAMP] = {"lamp", 0},                          // something to see with at night
    [LURE] = {"lure", 0},                          // something pretty that moves, of any colour
    [MARK] = {"mark", 0},                          // can be seen from far away; at least 3
    [STRONG] = {"strong", 0},                      // heavy things to build with
    [REACH] = {"fell toofar tool used", 0},        // the toy {fell}; but {toofar}; a {tool}; {used} the toy
    [TRAP] = {"trapped trapfail cutter freed", 0}, // somebody {trapped}; pulled, but {trapfail}; a {cutter}; {freed}
    [NOISE] = {"sound cause", 0},                  // "{Sound}!"; it was only {cause}
    [SKILL] = {"skill oops advice advised", 0},    // could not {skill}; {oops}; "{Advice}!"; the hero {advised}
    [PRECIOUS] = {"precious glue", 0},             // can break; mended with {glue}
    [WEAK] = {"weak weakfail", 0},                 // built it with {weak}, but {weakfail}
    [STORM] = {"storm stormend", 0},               // One day {storm}; until {stormend} was over
    [SHELTER] = {"shelter", 0},                    // hid {shelter}
    [CRY] = {"cry", 0},                            // what one calls out for joy here
    [TRAIT] = {"trait", 0}, [COLOUR] = {"colour", 0}, [BUILDING] = {"building", 0}, [DAY] = {"day", 0},
    [OPENING] = {"opening boast", 0},              // boast: the opening for those who brag of themselves
    [JOY] = {"joy", 0}, [CLOSING] = {"closing", 0},
};

typedef struct {
    const char *name;
    const char *rows[TABLES][MAX_ROWS + 1]; // each table ends with a null pointer
} World;

// ---------------------------------------------------------------------------------------------------------------
// The worlds
// ---------------------------------------------------------------------------------------------------------------

static const World worlds[] = {
    {"sea", {
        [NAME] = {"Finn/Marina", "Sandy/Shelly"},
        [KIND] = {"fish", "crab", "seahorse", "octopus", "starfish"},
        [ELDER] = {"Grandpa Turtle/Grandma Turtle", "Uncle Whale/Aunt Whale"},
        [HOME] = {"in the warm blue sea", "in a cave under the waves"},
        [HOBBY] = {"chase bubbles/chased bubbles", "dance in the seaweed/danced in the seaweed",
                   "count the boats/counted the boats", "ride on the waves/rode on the waves"},
        [GO] = {"swam"},
        [TOY] = {"shell", "pearl", "coin", "ring", "button", "ball"},
        [PLACE] = {"behind the coral", "under the big rock", "near the old ship", "in the seaweed",
                   "by the deep cave"},
        [FOOD] = {"sea grapes", "kelp", "green soup", "sea cakes", "sea nuts"},
        [STRANGER] = {"shrimp", "sea snail"}, [LAMP] = {"pearl lamp", "shell lamp"},
        [LURE] = {"jellyfish", "bubble", "boat"},
        [MARK] = {"old ship", "tall rock", "sandy hill", "iron anchor", "dark cave"},
        [STRONG] = {"big stones", "big shells"},
        [REACH] = {"fell into a deep hole in the sand/the hole was too deep/long hook"
                   "/let the hook down into the hole and pulled up",
                   "fell into a crack in the rock/the crack was too small/thin stick"
                   "/pushed the stick into the crack and got out",
                   "fell into a cave/the cave was too dark/little lamp/held up the lamp in the cave and found"},
        [TRAP] = {"was stuck in an old net/the net was too strong/sharp shell/cut the net with the sharp shell",
                  "was stuck under a rock/the rock was too heavy/strong pole/lifted the rock with the strong pole",
                  "was stuck in a tin can/the can was too tight/jar of soap/rubbed the can with the soap"},
        [NOISE] = {"Bump/an old barrel bumping into a rock", "Clank/a rusty anchor moving in the water",
                   "Whoo/the water running through an empty shell"},
        [SKILL] = {"ride a big wave/the wave threw {him} off/hold on tight/held on tight",
                   "blow a ring of bubbles/the bubbles broke too soon/blow very slowly/blew very slowly",
                   "dive down to the sand/the water pushed {him} back up/hold a heavy stone/held a heavy stone"},
        [PRECIOUS] = {"pearl mirror/sticky mud", "shell bowl/sea glue", "glass bottle/sea glue"},
        [WEAK] = {"sand/the waves washed it away", "seaweed/the water pulled it apart", "mud/a big wave hit it"},
        [STORM] = {"a storm came with high waves/the storm"}, [SHELTER] = {"in a big empty shell", "in an old barrel"},
        [CRY] = {"Fins and bubbles"},
    }},
    {"forest", {
        [NAME] = {"Rusty/Hazel", "Chip/Fern"},
        [KIND] = {"squirrel", "rabbit", "hedgehog", "fox"},
        [ELDER] = {"Grandpa Bear/Grandma Bear", "Uncle Moose/Aunt Moose"},
        [HOME] = {"in the deep green forest", "in a small house under an oak tree"},
        [HOBBY] = {"jump over logs/jumped over logs", "hide in the leaves/hid in the leaves",
                   "sing with the birds/sang with the birds", "run along the stream/ran along the stream"},
        [GO] = {"ran"},
        [TOY] = {"feather", "whistle", "kite", "ball", "bell", "basket"},
        [PLACE] = {"under the oak tree", "behind the berry bush", "near the stream", "beside the log",
                   "in the tall grass"},
        [FOOD] = {"berries", "nuts", "honey", "mushrooms", "apples"},
        [STRANGER] = {"mouse", "frog", "snail"}, [LAMP] = {"jar of fireflies", "lantern"},
        [LURE] = {"butterfly", "bird", "leaf"},
        [MARK] = {"hollow tree", "big rock", "wooden bridge", "waterfall", "ring of mushrooms"},
        [STRONG] = {"logs", "stones"},
        [REACH] = {"got stuck high up in a tree/the branch was too high/long stick"
                   "/reached up with the stick and pushed down",
                   "fell into the cold stream/the water was too fast/little net"
                   "/dipped the net into the water and lifted out",
                   "fell into a bush/the thorns were too sharp/pair of gloves/put on the gloves and took out"},
        [TRAP] = {"was stuck in a deep hole/the mud was too thick/strong rope/tied the rope to a tree and pulled",
                  "was stuck in a bush/the thorns were too sharp/small saw/cut the bush with the saw",
                  "was stuck under a log/the log was too heavy/strong pole/lifted the log with the strong pole"},
        [NOISE] = {"Knock/a branch knocking on a log", "Hoo/a little owl singing to the moon",
                   "Crunch/a snail eating a leaf"},
        [SKILL] = {"jump over the stream/{he} fell into the water/run before you jump/ran before {he} jumped",
                   "whistle like a bird/only a squeak came out/blow very slowly/blew very slowly",
                   "dance on a thin log/{he} fell off/look straight ahead/looked straight ahead"},
        [PRECIOUS] = {"honey pot/tree gum", "clay cup/tree gum", "wooden clock/glue"},
        [WEAK] = {"leaves/the wind blew it away", "mud/the rain washed it away", "grass/a hungry moose ate it"},
        [STORM] = {"dark clouds came and it began to rain/the rain"},
        [SHELTER] = {"in a hollow log", "under a giant mushroom"}, [CRY] = {"Nuts and berries"},
    }},
    {"farm", {
        [NAME] = {"Billy/Molly", "Toby/Betsy"},
        [KIND] = {"lamb", "calf", "piglet", "pony", "duckling"},
        [ELDER] = {"Grandpa Horse/Grandma Horse", "Uncle Bull/Aunt Cow"},
        [HOME] = {"on a big farm", "in a warm red barn"},
        [HOBBY] = {"roll in the hay/rolled in the hay", "run round the barn/ran round the barn",
                   "splash in the puddles/splashed in the puddles", "chase the chickens/chased the chickens"},
        [GO] = {"ran"},
        [TOY] = {"bell", "ribbon", "hat", "horn", "bucket", "ball"},
        [PLACE] = {"behind the barn", "under the old cart", "near the pond", "beside the gate", "by the apple tree"},
        [FOOD] = {"hay", "apples", "carrots", "corn", "oats"},
        [STRANGER] = {"chick", "mouse"}, [LAMP] = {"lantern", "flashlight"},
        [LURE] = {"butterfly", "balloon", "dragonfly"},
        [MARK] = {"windmill", "stone wall", "scarecrow", "white fence", "hay cart"},
        [STRONG] = {"bricks", "logs"},
        [REACH] = {"landed on the roof of the barn/the roof was too high/long pole"
                   "/reached up with the pole and pushed down",
                   "fell into the well/the well was too deep/long rope with a hook"
                   "/let the rope down into the well and pulled up",
                   "slid under the henhouse/the gap was too low/long stick"
                   "/pushed the stick under the henhouse and got out"},
        [TRAP] = {"was stuck in the mud/the mud was too thick/strong rope/tied the rope to the gate and pulled",
                  "was stuck in the fence/the gap was too tight/pot of butter/rubbed the fence with the butter",
                  "was shut in the henhouse/the lock was too strong/small key/opened the lock with the small key"},
        [NOISE] = {"Creak/a gate moving in the wind", "Bang/a bucket bumping into a wall",
                   "Snore/a big pig, fast asleep"},
        [SKILL] = {"jump over the hay/{he} fell into it/run before you jump/ran before {he} jumped",
                   "cross the pond on the stones/{he} fell into the water/look straight ahead/looked straight ahead",
                   "pull the little cart/the cart rolled away/lean forward/leaned forward"},
        [PRECIOUS] = {"milk bottle/glue", "wooden clock/glue", "flower pot/wet clay"},
        [WEAK] = {"hay/a hungry cow ate it", "leaves/the wind blew it away", "mud/the rain washed it away"},
        [STORM] = {"dark clouds came and it began to rain/the rain"},
        [SHELTER] = {"in the henhouse", "under the hay cart"}, [CRY] = {"Hay and oats"},
    }},
    {"castle", {
        [NAME] = {"Leo/Rosa", "Arthur/Bella"},
        [KIND] = {"prince/princess", "knight", "dragon", "wizard/witch", "unicorn"},
        [ELDER] = {"King Otto/Queen Emma", "Grandpa Giant/Grandma Giant"},
        [HOME] = {"in a tall stone castle", "in a tower with a golden roof"},
        [HOBBY] = {"march up and down the stairs/marched up and down the stairs", "wave the flags/waved the flags",
                   "look for secret doors/looked for secret doors", "dance in the great hall/danced in the great hall"},
        [GO] = {"ran"},
        [TOY] = {"crown", "drum", "flag", "ring", "cup", "ball"},
        [PLACE] = {"behind the throne", "under the long table", "near the moat", "beside the stairs",
                   "by the golden door"},
        [FOOD] = {"grapes", "plums", "honey cakes", "cheese", "pears"},
        [STRANGER] = {"mouse", "bat", "spider"}, [LAMP] = {"candle", "torch"},
        [LURE] = {"bird", "butterfly", "balloon"},
        [MARK] = {"fountain", "stone lion", "iron gate", "round tower", "old bridge"},
        [STRONG] = {"stones", "bricks"},
        [REACH] = {"fell into the moat/the water was too deep/long net/dipped the net into the water and lifted out",
                   "fell through a window of the tower/the lock was too strong/rusty key"
                   "/opened the tower with the rusty key and took out",
                   "fell into the cellar/the cellar was too dark/small candle"
                   "/held up the candle in the cellar and found"},
        [TRAP] = {"was stuck in a suit of armor/the armor was too tight/jar of oil/rubbed the armor with the oil",
                  "was shut in the tower/the lock was too strong/golden key/opened the tower with the golden key",
                  "was stuck in the moat/the mud was too thick/strong rope/tied the rope to the gate and pulled"},
        [NOISE] = {"Clank/an old helmet rolling on the floor", "Whoo/the wind blowing through a window",
                   "Squeak/a bat playing on a rusty lamp"},
        [SKILL] = {"blow the golden horn/only a squeak came out/blow very slowly/blew very slowly",
                   "dance like a queen/{he} fell over/listen to the drum/listened to the drum",
                   "juggle three apples/the apples fell on the floor/look up and not down/looked up and not down"},
        [PRECIOUS] = {"glass bowl/magic glue", "golden clock/magic glue", "silver mirror/magic glue"},
        [WEAK] = {"cards/the wind blew it away", "pillows/it fell over", "cookies/a hungry bat ate it"},
        [STORM] = {"dark clouds came and hail fell from the sky/the hail"},
        [SHELTER] = {"under the throne", "in a small tower"}, [CRY] = {"Crowns and drums"},
    }},
    {"space", {
        [NAME] = {"Zip/Luna", "Neo/Nova"},
        [KIND] = {"robot", "alien", "astronaut", "moon mouse", "space cat"},
        [ELDER] = {"Captain Bolt/Captain Star", "Doctor Mars/Doctor Venus"},
        [HOME] = {"on a small round moon", "in a silver space ship"},
        [HOBBY] = {"float with the stars/floated with the stars", "count the comets/counted the comets",
                   "jump over craters/jumped over craters", "wave to the planets/waved to the planets"},
        [GO] = {"flew"},
        [TOY] = {"rocket", "gem", "ring", "helmet", "button", "ball"},
        [PLACE] = {"behind the big rocket", "near the deep crater", "under the radio tower", "beside the moon cave",
                   "by the glass dome"},
        [FOOD] = {"moon cheese", "star cookies", "space soup", "comet candy", "star jelly"},
        [STRANGER] = {"space bug", "moon worm", "star bird"}, [LAMP] = {"flashlight", "star lamp"},
        [LURE] = {"comet", "star", "light"},
        [MARK] = {"planet with a ring", "old satellite", "ice comet", "round crater", "metal tower"},
        [STRONG] = {"moon rocks", "metal boxes"},
        [REACH] = {"floated away into space/it was too far away/long rope with a hook"
                   "/threw out the rope and pulled back",
                   "fell into a deep crater/the crater was too deep/metal claw"
                   "/reached down with the claw and lifted out",
                   "fell into a cave/the cave was too dark/small flashlight"
                   "/held up the flashlight in the cave and found"},
        [TRAP] = {"was stuck in the moon dust/the dust was too deep/wide shovel/dug away the dust with the shovel",
                  "was shut in the rocket/the lock was too strong/silver key/opened the rocket with the silver key",
                  "was stuck in a long wire/the wire was too tight/small saw/cut the wire with the saw"},
        [NOISE] = {"Beep/an old radio playing a song", "Clunk/a small stone bumping into a wall",
                   "Tick/an old clock in a box"},
        [SKILL] = {"land the little rocket/the rocket fell over/look straight ahead/looked straight ahead",
                   "jump from rock to rock/{he} floated away/hold a heavy stone/held a heavy stone",
                   "fly round a planet/{he} got lost/lean to one side/leaned to one side"},
        [PRECIOUS] = {"moon globe/star glue", "radio/a new wire", "space clock/tape"},
        [WEAK] = {"moon dust/it floated away", "paper/a hot comet burned it", "pillows/it floated apart"},
        [STORM] = {"a storm of stones fell from the sky/the storm"},
        [SHELTER] = {"in an old rocket", "under a metal dome"}, [CRY] = {"Stars and moons"},
    }},
    {"snow", {
        [NAME] = {"Boris/Nika", "Igor/Anya"},
        [KIND] = {"penguin", "seal", "white bear", "reindeer", "snow fox"},
        [ELDER] = {"Grandpa Walrus/Grandma Walrus", "Uncle Yeti/Aunt Yeti"},
        [HOME] = {"in the land of ice and snow", "in a round house of ice"},
        [HOBBY] = {"slide down the hill/slid down the hill", "catch snowflakes/caught snowflakes",
                   "roll big snowballs/rolled big snowballs", "skate on the lake/skated on the lake"},
        [GO] = {"ran"},
        [TOY] = {"drum", "scarf", "mitten", "bell", "hat", "ball"},
        [PLACE] = {"behind the snowman", "under the ice bridge", "near the lake", "beside the pine tree",
                   "by the snow hill"},
        [FOOD] = {"fish cakes", "hot soup", "warm bread", "cookies", "jam"},
        [STRANGER] = {"snow mouse", "snow bird"}, [LAMP] = {"lantern", "candle"}, [LURE] = {"light", "bird", "balloon"},
        [MARK] = {"snowman", "ice bridge", "tall pine tree", "wooden hut", "frozen waterfall"},
        [STRONG] = {"ice blocks", "logs"},
        [REACH] = {"fell into a hole in the ice/the water was too cold/fishing line"
                   "/let the fishing line down into the hole and pulled up",
                   "fell into deep snow/the snow was too deep/small shovel/dug in the snow with the shovel and found",
                   "landed on top of an ice wall/the wall was too high/long stick"
                   "/reached up with the stick and pushed down"},
        [TRAP] = {"was stuck in deep snow/the snow was too heavy/wide shovel/dug away the snow with the shovel",
                  "was stuck on the ice/the ice was too strong/pot of warm water/poured the warm water on the ice",
                  "was stuck in a crack in the ice/the crack was too deep/strong rope"
                  "/tied the rope to a tree and pulled"},
        [NOISE] = {"Crack/a tree moving in the wind", "Drip/some ice melting on a rock",
                   "Whoo/the wind blowing through an empty cave"},
        [SKILL] = {"skate on the ice/{he} fell down/lean forward/leaned forward",
                   "stop a fast sled/the sled hit a snowman/lean back/leaned back",
                   "carry a big snowball/the snowball rolled away/hold on tight/held on tight"},
        [PRECIOUS] = {"ice lamp/snow and water", "clay pot/fish glue", "ice mirror/snow and water"},
        [WEAK] = {"snow/the wind blew it away", "thin ice/it melted in the sun", "cookies/a hungry seal ate it"},
        [STORM] = {"a snowstorm came/the snowstorm"}, [SHELTER] = {"in a small snow cave", "under an old boat"},
        [CRY] = {"Ice and snow"},
    }},
    {"kitchen", {
        [NAME] = {"Basil/Olive", "Crumbs/Candy"},
        [KIND] = {"mouse", "elf", "gingerbread boy/gingerbread girl", "beetle"},
        [ELDER] = {"Grandpa Rat/Grandma Rat", "Uncle Hamster/Aunt Hamster"},
        [HOME] = {"in a big warm kitchen", "in a drawer full of spoons"},
        [HOBBY] = {"slide down the spoons/slid down the spoons", "play in the flour/played in the flour",
                   "dance on the table/danced on the table", "jump over the plates/jumped over the plates"},
        [GO] = {"ran"},
        [TOY] = {"button", "spoon", "cup", "bead", "coin", "ball"},
        [PLACE] = {"behind the stove", "under the table", "near the sugar bowl", "beside the tea pot",
                   "by the bread box"},
        [FOOD] = {"cheese", "sugar", "cookies", "bread", "jam"},
        [STRANGER] = {"ant", "moth", "fly"}, [LAMP] = {"candle", "night lamp"},
        [LURE] = {"feather", "balloon", "bubble"},
        [MARK] = {"tower of plates", "bag of flour", "milk bottle", "egg basket", "salt jar"},
        [STRONG] = {"wooden spoons", "tin boxes"},
        [REACH] = {"slid under the stove/the gap was too low/long fork"
                   "/pushed the fork under the stove and got out",
                   "fell into the jam jar/the jam was too sticky/big spoon"
                   "/dipped the spoon into the jam and lifted out",
                   "landed on the top shelf/the shelf was too high/long string with a hook"
                   "/threw up the string and pulled down"},
        [TRAP] = {"was stuck in a bottle/the bottle was too deep/long string/let down the string and pulled",
                  "was stuck in the jam/the jam was too sticky/cup of warm water/poured the warm water on the jam",
                  "was shut in the bread box/the lid was too heavy/strong fork/lifted the lid with the fork"},
        [NOISE] = {"Drip/some water falling into a cup", "Rattle/a lid dancing on a hot pot",
                   "Tick/an old clock in a jar"},
        [SKILL] = {"flip a pancake/the pancake landed on {his} head/hold the pan with care/held the pan with care",
                   "roll an egg along the floor/the egg rolled away/walk behind it/walked behind it",
                   "climb the stove/{he} slid back down/hold on tight/held on tight"},
        [PRECIOUS] = {"tea cup/egg and flour", "sugar bowl/honey glue", "painted plate/honey glue"},
        [WEAK] = {"sugar/it melted in the tea", "bread/a hungry fly ate it", "paper/the wind blew it away"},
        [STORM] = {"a pot fell over and hot soup ran everywhere/the flood"},
        [SHELTER] = {"in a tea pot", "in a bread box"}, [CRY] = {"Sugar and salt"},
    }},
    {"garden", {
        [NAME] = {"Twig/Daisy", "Sprout/Lily"},
        [KIND] = {"ladybug", "ant", "beetle", "grasshopper", "caterpillar"},
        [ELDER] = {"Grandpa Toad/Grandma Toad", "Uncle Snail/Aunt Snail"},
        [HOME] = {"in a garden full of roses", "under a pumpkin leaf"},
        [HOBBY] = {"swing on the grass/swung on the grass", "sing to the flowers/sang to the flowers",
                   "slide down the leaves/slid down the leaves", "count the bees/counted the bees"},
        [GO] = {"hurried"},
        [TOY] = {"seed", "bead", "marble", "bell", "feather", "button"},
        [PLACE] = {"under the rose bush", "behind the flower pot", "near the pond", "beside the pumpkin",
                   "by the garden gate"},
        [FOOD] = {"sweet dew", "peas", "strawberries", "seeds", "honey"},
        [STRANGER] = {"worm", "moth", "fly"}, [LAMP] = {"jar of fireflies", "flower lamp"},
        [LURE] = {"butterfly", "bee", "leaf"},
        [MARK] = {"sunflower", "stone frog", "bird bath", "apple tree", "tin bucket"},
        [STRONG] = {"stones", "nut shells"},
        [REACH] = {"fell on a flower in the pond/the water was too deep/big leaf"
                   "/took the leaf as a boat and got back",
                   "fell into an empty bucket/the bucket was too deep/long vine"
                   "/let the vine down into the bucket and pulled up",
                   "fell into a spider web/the web was too sticky/sharp thorn"
                   "/cut the web with the thorn and took down"},
        [TRAP] = {"was stuck in a spider web/the web was too sticky/sharp thorn/cut the web with the thorn",
                  "was stuck under a flower pot/the pot was too heavy/strong stick/lifted the pot with the stick",
                  "was stuck in a deep hole/the hole was too deep/long vine/let down the vine and pulled"},
        [NOISE] = {"Plop/some water falling on a leaf", "Crunch/a hedgehog eating some nuts",
                   "Croak/a frog singing to the moon"},
        [SKILL] = {"climb the tall sunflower/{he} slid back down/hold on tight/held on tight",
                   "jump from leaf to leaf/{he} fell into the grass/look straight ahead/looked straight ahead",
                   "cross the pond on a leaf/{he} fell into the water/sit in the middle/sat in the middle"},
        [PRECIOUS] = {"clay cup/wet clay", "honey jar/tree gum", "nut bowl/tree gum"},
        [WEAK] = {"grass/the wind blew it away", "leaves/a hungry worm ate it", "mud/the rain washed it away"},
        [STORM] = {"dark clouds came and it began to rain/the rain"},
        [SHELTER] = {"under a mushroom", "in a flower pot"}, [CRY] = {"Bees and roses"},
    }},
    {"toyshop", {
        [NAME] = {"Jack/Polly", "Tom/Tilly"},
        [KIND] = {"teddy bear", "doll", "toy soldier", "puppet"},
        [ELDER] = {"Grandpa Giraffe/Grandma Giraffe", "Uncle Clown/Aunt Clown"},
        [HOME] = {"on a shelf in the toyshop", "in a big toyshop"},
        [HOBBY] = {"dance to the music box/danced to the music box", "ride on the toy train/rode on the toy train",
                   "hide in the gift boxes/hid in the gift boxes", "look out of the window/looked out of the window"},
        [GO] = {"ran"},
        [TOY] = {"ball", "drum", "top", "whistle", "block", "kite"},
        [PLACE] = {"behind the doll house", "under the table", "near the toy train", "beside the gift boxes",
                   "by the big window"},
        [FOOD] = {"cookies", "jelly beans", "cupcakes", "candy", "strawberries"},
        [STRANGER] = {"clay duck", "paper bird", "tin frog"}, [LAMP] = {"flashlight", "paper lantern"},
        [LURE] = {"paper plane", "balloon", "toy car"},
        [MARK] = {"toy castle", "shelf of books", "rocking horse", "doll house", "paper tree"},
        [STRONG] = {"wooden blocks", "toy bricks"},
        [REACH] = {"slid under the shelf/the gap was too low/long stick"
                   "/pushed the stick under the shelf and got out",
                   "fell into the glass box/the lock was too strong/small key"
                   "/opened the glass box with the small key and took out",
                   "landed on the lamp/the lamp was too high/toy crane/reached up with the crane and took down"},
        [TRAP] = {"was stuck in a gift box/the ribbon was too tight/pair of scissors"
                  "/cut the ribbon with the scissors",
                  "was shut in the glass box/the lock was too strong/small key"
                  "/opened the glass box with the small key",
                  "was stuck under some books/the books were too heavy/toy crane/lifted the books with the crane"},
        [NOISE] = {"Ding/a music box that was not shut", "Rattle/a toy car bumping into a wall",
                   "Tick/an old clock in a box"},
        [SKILL] = {"stand on one leg/{he} fell over/look straight ahead/looked straight ahead",
                   "juggle three blocks/the blocks fell on the floor/look up and not down/looked up and not down",
                   "ride the little bike/the bike fell over/hold on tight/held on tight"},
        [PRECIOUS] = {"painted plate/glue", "music box/glue", "snow globe/tape"},
        [WEAK] = {"cards/the wind blew it away", "pillows/it fell over", "jelly beans/a hungry mouse ate it"},
        [STORM] = {"the window was open and rain came in/the rain"},
        [SHELTER] = {"in a doll house", "under a big book"}, [CRY] = {"Tops and drums"},
    }},
    {"jungle", {
        [NAME] = {"Bongo/Kiki", "Raja/Tara"},
        [KIND] = {"monkey", "tiger", "panda", "lion"},
        [ELDER] = {"Grandpa Elephant/Grandma Elephant", "Uncle Hippo/Aunt Hippo"},
        [HOME] = {"in the hot green jungle", "in a hut of leaves by a wide river"},
        [HOBBY] = {"splash in the river/splashed in the river", "roll in the mud/rolled in the mud",
                   "play drums on the logs/played drums on the logs", "chase the parrots/chased the parrots"},
        [GO] = {"ran"},
        [TOY] = {"drum", "mask", "flute", "feather", "basket", "ball"},
        [PLACE] = {"under the palm tree", "behind the waterfall", "near the river", "in the tall grass",
                   "by the old temple"},
        [FOOD] = {"bananas", "mangoes", "coconuts", "nuts", "honey"},
        [STRANGER] = {"lizard", "frog", "parrot"}, [LAMP] = {"torch", "jar of fireflies"},
        [LURE] = {"butterfly", "parrot", "dragonfly"},
        [MARK] = {"old temple", "stone monkey", "rope bridge", "tall palm tree", "waterfall"},
        [STRONG] = {"bamboo poles", "river stones"},
        [REACH] = {"got stuck high up in a palm tree/the tree was too high/bamboo pole"
                   "/reached up with the pole and pushed down",
                   "floated out on the river/the river was too fast/long vine with a hook"
                   "/threw out the vine and pulled back",
                   "fell into a hole in the temple/the hole was too dark/small torch"
                   "/held up the torch in the hole and found"},
        [TRAP] = {"was stuck in the mud/the mud was too thick/strong vine/tied the vine to a tree and pulled",
                  "was stuck in an old net/the net was too strong/sharp stone/cut the net with the sharp stone",
                  "was stuck under a tree/the tree was too heavy/bamboo pole/lifted the tree with the pole"},
        [NOISE] = {"Boom/some coconuts falling on a log", "Snore/an old tiger, fast asleep",
                   "Hoo/a parrot singing to the moon"},
        [SKILL] = {"swing over the river/{he} fell into the water/hold on tight/held on tight",
                   "play the flute/only a squeak came out/blow very slowly/blew very slowly",
                   "open a coconut/the coconut rolled away/hit it with a stone/hit it with a stone"},
        [PRECIOUS] = {"clay bowl/wet clay", "wooden mask/tree gum", "water jar/wet clay"},
        [WEAK] = {"grass/the wind blew it away", "banana leaves/a hungry hippo ate it", "mud/the rain washed it away"},
        [STORM] = {"warm rain fell from the sky/the rain"}, [SHELTER] = {"under a giant leaf", "in a small cave"},
        [CRY] = {"Drums and bananas"},
    }},
};
enum { WORLDS = sizeof(worlds) / sizeof(worlds[0]) };

// ---------------------------------------------------------------------------------------------------------------
// What the worlds share: a table that a world leaves empty is taken from here
// ---------------------------------------------------------------------------------------------------------------

static const World everywhere = {"everywhere", {
    [PARENT] = {"Papa/Mama", "Dad/Mom"},
    [HE] = {"he/she"},
    [HIM] = {"him/her"},
    [HIS] = {"his/her"},
    [TRAIT] = {"brave", "shy", "kind", "curious", "clever", "funny", "quiet", "cheerful"},
    [COLOUR] = {"red", "blue", "green", "yellow", "pink", "purple", "orange", "white"},
    [BUILDING] = {"little house", "tall tower", "round fort", "play house"},
    [DAY] = {"One day", "One morning", "One fine day"},
    [OPENING] = { // each says the name twice, and after a space, so that a small model soon learns to look for it
        "[Once upon a time|Long ago], there was @ {trait} little {kind} named {name}. {Name} lived {home}, and {he} loved "
        "to {hobby}./[Once upon a time|Long ago], there was @ little {kind} named {name}. {Name} lived {home}.",
        "This is the story of {name}, @ {trait} little {kind}. {Name} lived {home}. Every day {he} {hobbied}./This is "
        "the story of {name}, @ little {kind}. {Name} lived {home}.",
        "{Home} lived @ little {kind} named {name}. {Name} was very {trait}, and {he} loved to {hobby}./{Home} lived @ "
        "little {kind} named {name}.",
    },
    [JOY] = {
        "\"{Cry}!\" [cried|shouted] {name2}.",
        "\"{Cry}!\" they [cried|shouted] together.",
        "{Name} and {name2} [danced and sang|laughed and hugged].",
        "{Name2} gave {name} a big hug.",
    },
    [CLOSING] = {
        "That night, the {trait} little {kind} [slept well|went to bed with a smile].",
        "{Name} went home with a [big smile|happy heart].",
        "The next day, {name} {hobbied} again.",
    },
}};

// ---------------------------------------------------------------------------------------------------------------
// What differs from that in the stories of the small cast, where every world has one hero and one friend
// ---------------------------------------------------------------------------------------------------------------

static const World small_cast = {"small cast", {
    [OPENING] = {
        "[Once upon a time|Long ago], there was @ {trait} little {kind} named {name}. {He} lived {home} and loved to "
        "{hobby}./{Name} was @ little {kind}. {He} lived {home}.",
        "{Name} was @ {trait} little {kind}. {He} lived {home}. Every day {he} {hobbied}./{Name} was @ little {kind}. {He} "
        "lived {home}.",
        "{Home} lived @ little {kind} named {name}. {He} was very {trait} and {he} loved to {hobby}./{Name} was @ little "
        "{kind}. {He} lived {home}.",
    },
}};

// ---------------------------------------------------------------------------------------------------------------
// The plots
// ---------------------------------------------------------------------------------------------------------------

static const char *const plots[] = {
    // The lost toy: it lies where the hero ate.
    "{opening} {His} best thing [of all|in the whole world] was @ {colour} {toy}.\n\n"
    "{day}, {name} sat down {place} with the {toy} and ate some {food}. But [in the evening|at night], the {toy} was "
    "gone! \"[Oh no|Oh dear]! Where is my {colour} {toy}?\" {he} cried. {He} looked {place2}, but it was not there. "
    "{He} looked {place3}, but it was not there either.\n\n"
    "{Name2} the {kind2} [came to help|saw that {name} was sad]. \"Think hard,\" said {name2}. \"Where did you eat "
    "today?\" \"I ate {food} {place}!\" said {name}. They {went} there at once. [And there|Hurray! There], {place}, "
    "lay the {colour} {toy}! {joy} {closing}",

    // Out of reach: the elder's gift is the tool that is needed.
    "{opening} [On {his} birthday|One morning], {elder3} gave {him} @ {tool}. \"[Keep this with you|Take good care of "
    "this],\" said {elder3}. \"One day it will help.\"\n\n"
    "Later, {name} and {name2} the {kind2} played with @ {colour} {toy}. [Oops|Oh no]! The {toy} {fell}. {Name} tried "
    "to get it, but {toofar}. {Name2} could not get it either. \"Now our {toy} is lost,\" said {name2}[ in a sad "
    "voice|].\n\n"
    "[Then|All at once,] {name} remembered the gift from {elder3}. \"I have @ {tool}!\" {he} said. {He} {used} the "
    "{colour} {toy}. {joy} [\"{Elder3} was right,\" said {name}. \"The {tool} did help.\"|They {went} to {elder3} and "
    "said thank you for the {tool}.|{closing}]",

    // The stuck friend: the hero always carried the right thing.
    "{opening} {He} always carried @ {cutter}. \"You never know,\" {he} liked to say.\n\n"
    "{day}, {name} heard a cry. \"Help! Help!\" It was {name2} the {kind2}. {Name2} {trapped}. {Name} tried to pull "
    "{him2} out, but {trapfail}. {Elder3} tried it too, but {trapfail} even for {elder3}. \"[Must I stay here "
    "forever|Will I ever get out]?\" asked {name2}[ in a sad voice|].\n\n"
    "[Then|All at once,] {name} remembered the {cutter}. {He} {freed}. [Pop|Hop]! {Name2} was free! {joy} \"Now I "
    "know why you always carry @ {cutter},\" said {name2}. \"You never know,\" said {name}[ with a smile|, and they "
    "both laughed].",

    // The monster in the night, and the friend's lamp.
    "{opening} [On {his} birthday|One morning], {name2} the {kind2} gave {him} @ {lamp}.\n\n"
    "One night, {name} heard a [strange|loud] noise {place}. \"{Sound}! {Sound}!\" it went. \"It is a monster!\" {he} "
    "whispered. {He} [closed {his} eyes|hid {his} head], but the noise did not stop. {He} sang a song, but the noise "
    "did not stop. \"{Sound}! {Sound}!\"\n\n"
    "[Then|All at once,] {name} remembered the {lamp} from {name2}. {He} held it up and went to look. [And what|What] "
    "was there {place}? It was only {cause}! {Name} laughed[ and laughed|].\n\n"
    "In the morning, {he} told {name2} about it. \"Were you afraid?\" asked {name2}. \"Yes, but your {lamp} made me "
    "brave,\" said {name}. [\"Everyone is afraid sometimes,\" said {name2}.|{Name2} gave {him} a big hug.]",

    // The quarrel: the toy is no fun alone.
    "{opening}\n\n"
    "{day}, {name} and {name2} the {kind2} found @ {colour} {toy} {place}. \"It is mine!\" said {name}. \"No, it is "
    "mine!\" said {name2}. They [pulled and pulled|shouted and shouted]. Then {elder3} came. \"{Name} may have the "
    "{toy} in the morning,\" {he3} said, \"and {name2} in the evening.\"\n\n"
    "So in the morning, {name} played with it alone. It was no fun. In the evening, {name2} played with it alone. It "
    "was no fun either.\n\n"
    "The next day, {name} {went} to {name2}. \"[I am sorry|It is no fun without you],\" {he} said. \"Let us play "
    "together.\" They met {place} and played all day. \"What have you learned?\" asked {elder3}. \"[The {colour} "
    "{toy} is best for two|It is more fun to share the {colour} {toy}]!\" said {name}.",

    // The lion and the mouse: a stranger gets food and comes back to help.
    "{opening}\n\n"
    "{day}, {name} met @ tiny {stranger} {place}. \"I am so hungry,\" it [said|cried]. {Name} had only a bowl "
    "of {food}, but {he} gave half of it to the {stranger}. \"One day I will help you,\" it said. {Name} smiled. How "
    "could @ tiny {stranger} help anyone?\n\n"
    "[In the evening|The next day], {name} {trapped}. {He} tried to get out, but {trapfail}. [Nobody came to "
    "help.|{He} began to cry.] Then the {stranger} heard {him}. It came with all its [friends|brothers and "
    "sisters] and @ {cutter}. Together they {freed}. {Name} was free!\n\n"
    "\"You gave me {food} when I was hungry,\" said the {stranger}. \"[Now|So] I came to help you.\" [Even a tiny "
    "friend can be a big help.|{closing}]",

    // Learning something hard, and handing it on.
    "{opening} But {he} could not {skill}.\n\n"
    "{day}, {name} tried it. [Oops|Oh no]! {Oops}. {He} tried it again, but {oops} again. \"[I will never learn it|It "
    "is too hard for me],\" {he} said[ in a sad voice|]. {Name2} the {kind2} sat down with {him} {place}. \"It was "
    "hard for me too,\" said {name2}. \"{Advice}, and try once more.\"\n\n"
    "So {name} tried once more. {He} {advised}, and this time it worked! \"{Cry}! I can {skill}!\" {he} "
    "[cried|shouted]. {Name2} was [proud of {him}|happy too].\n\n"
    "The next week, @ tiny {stranger} said, \"I can not {skill}.\" {Name} smiled. \"It was hard for me too,\" {he} "
    "said. \"{Advice}, and try once more.\"",

    // The way home: three landmarks out, the same three back.
    "{opening}\n\n"
    "{day}, {name} saw @ {colour} {lure} and {went} after it. {He} {went} past @ {mark}, then past @ {mark2}, and "
    "then past @ {mark3}. [All at once,|Then] the {lure} was gone, and {name} was lost. \"{Parent4}! {Parent4}!\" "
    "{he} called, but nobody came. {He} {went} this way and that way, but it was no help.\n\n"
    "Then {name} had an idea. \"First I must find the {mark3},\" {he} said. Soon {he} saw it. From the {mark3} {he} "
    "{went} to the {mark2}, and from the {mark2} to the {mark}. And there was {parent4} with some {food}!\n\n"
    "\"Where were you?\" asked {parent4}. \"I {went} after @ {colour} {lure},\" said {name}, \"but I found the way "
    "home.\" [{Parent4} gave {him} a big hug.|{Parent4} was proud of {him}.|They ate the {food} together.|{closing}]",

    // The broken thing: hiding it feels bad, telling the truth feels good.
    "{opening}\n\n"
    "{day}, {name} played with @ {colour} {toy} and bumped into the {precious} of {elder3}. Crash! The {precious} "
    "broke. {Name} was [afraid|very sorry] and hid the pieces {place}. \"Where is my {precious}?\" asked {elder3}. "
    "\"I [do not know|did not see it],\" said {name}.\n\n"
    "But {name} felt bad. {He} played with the {toy}, but it was no fun. {He} ate some {food}, but it was no fun "
    "either. So {he} {went} to {elder3}. \"I broke your {precious},\" {he} said, \"and the pieces are {place}. I am "
    "sorry.\"\n\n"
    "{Elder3} was not angry[ at all|]. \"Thank you for telling the truth,\" {he3} said. Together they mended the "
    "{precious} with {glue}. [\"Now I like it even more,\" said {elder3}.|{closing}]",

    // The birthday: the colour that the friend loves.
    "{opening} {His} best friend was {name2} the {kind2}. {Name2} loved {colour} things.\n\n"
    "Soon it was the birthday of {name2}. \"I will find @ {colour} {toy} for {him2},\" said {name}. {He} looked "
    "{place} and found @ {colour2} {toy}. \"It is nice, but it is not {colour},\" {he} said. {He} looked {place2} and "
    "found @ {colour3} {toy}. \"It is nice, but it is not {colour} either.\"\n\n"
    "[Then {elder3}|{Elder3}] came by. \"I saw something {colour} {place3},\" {he3} said. {Name} {went} there at "
    "once. And there, {place3}, lay @ {colour} {toy}!\n\n"
    "\"Happy birthday!\" said {name}. \"Oh, @ {colour} {toy}!\" cried {name2}. \"How did you know?\" \"[A good friend "
    "knows what you love|I know what you love],\" said {name}. {joy}",

    // The shopping song: the last of three things is forgotten.
    "{opening}\n\n"
    "{day}, {parent4} said, \"Please get {food}, {food2} and {food3} from {elder3}.\" {Name} made a little song. "
    "\"{Food}, {food2} and {food3}!\" {he} sang. {Name2} the {kind2} heard the song and [laughed|smiled].\n\n"
    "But {name} stopped to play {place}, and when {he} came to {elder3}, the song was gone. \"I need {food} and "
    "{food2},\" {he} said, \"and...\" \"Is it {food4}?\" asked {elder3}. \"No,\" said {name}. \"Is it {food5}?\" "
    "\"No,\" said {name}, and {he} began to cry.\n\n"
    "Then {name2} came by and sang, \"{Food}, {food2} and {food3}!\" \"{Food3}! That is it!\" cried {name}. They "
    "{went} home with all three. [Can you guess what they sang?|And they sang all the way.] \"{Food}, {food2} and "
    "{food3}!\"",

    // Room for one more.
    "{opening}\n\n"
    "{day}, {storm}. {Name} hid {shelter} with some {food}. Soon {name2} the {kind2} came. \"May I come in?\" {he2} "
    "asked. \"Yes,\" said {name}, \"there is room for two.\" Then @ tiny {stranger} came. \"Yes,\" said {name}, "
    "\"there is room for three.\"\n\n"
    "At last {elder3} came, and {elder3} was big. {He3} tried it head first, but {he3} got stuck. {He3} tried it back "
    "first, but {he3} got stuck again. {Name} [thought hard|had an idea]. \"{Name2} can sit on my back,\" {he} said, "
    "\"and the {stranger} can sit on {elder3}.\" It worked! There was room for four.\n\n"
    "They ate the {food} and told stories until {stormend} was over. [\"There is always room for a friend,\" said "
    "{name}.|\"You have a little house but a big heart,\" said {elder3}.]",

    // The race: the fast one sleeps.
    "{boast} \"I am the fastest of all!\" {he} always said. {Name2} the "
    "{kind2} was slow, but {he2} never gave up.\n\n"
    "{day}, {name2} said, \"Let us race to the {mark}.\" {Name} laughed. \"One, two, three, go!\" called {elder3}. "
    "{Name} {went} very fast. At the {mark2}, {he} could not see {name2} any more. So {he} sat down, ate some {food} "
    "and fell asleep.\n\n"
    "{Name2} {went} on and on. At the {mark2}, {he2} saw {name} asleep, but {he2} did not stop. When {name} woke up, "
    "it was too late. {Name2} was at the {mark}!\n\n"
    "\"You won,\" said {name}. \"I was fast, but you did not stop.\" They ate the rest of the {food} together. "
    "[{Name} never said again that {he} was the fastest.|\"It is good to be fast,\" said {elder3}, \"but it is "
    "better to never stop.\"]",

    // The building: it is too heavy for one, but not for two.
    "{opening}\n\n"
    "{day}, {name} wanted to build @ {building}. There were some {strong} {place}, but they were too heavy. So {he} "
    "built it with {weak}, but {weakfail}. Then {he} built it with {weak2}, but {weakfail2}. {Name} [sat down and "
    "cried|was very sad].\n\n"
    "{Name2} the {kind2} [came by|came to help]. \"The {strong} {place} are too heavy for me,\" said {name}. \"They "
    "are too heavy for one,\" said {name2}, \"but not for two!\" Together they carried the {strong}, one by one. In "
    "the evening, the {building} was done. They pushed it and pulled it, but it did not fall. [{joy}|\"With a friend, "
    "heavy things are light,\" said {name}.] {closing}",
};
enum { PLOTS = sizeof(plots) / sizeof(plots[0]) };
// clang-format on
