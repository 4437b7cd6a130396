//! Grounded rationales: sentences that state measured facial cues, then sentences that draw an emotion from them,
//! and the parser that reads the stated cues back so that they can be held against the measurement.
//!
//! Every wording belongs to one of two banks. Rationales to train on use [`Bank::Train`] alone; [`Bank::HeldOut`]
//! shares neither sentence frames nor emotion words with it and only ever tests the verifier.

use rand::Rng;
use rand::seq::IndexedRandom;

/// A cue is stated where its measured value lies further than this from a neutral face, in spreads of the
/// population.
pub const STATED_BEYOND: f32 = 0.6;

/// A stated cue counts as right where `value · direction` is at least this. Lower than [`STATED_BEYOND`]: landmarks
/// are good to about a quarter of a spread, and a sentence that is nearly right must not count as wrong.
pub const RIGHT_BEYOND: f32 = 0.3;

/// What is measured on a face, each relative to neutral faces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)] // the names are the documentation
pub enum Cue {
    InnerBrowHeight,
    OuterBrowHeight,
    BrowGap,
    EyeOpening,
    MouthOpening,
    MouthWidth,
    MouthCornerLift,
    UpperLipRaise,
    LipThickness,
}

impl Cue {
    /// Number of cues.
    pub const COUNT: usize = 9;
    /// Every cue, in the order values are kept in.
    pub const ALL: [Cue; Cue::COUNT] = [
        Cue::InnerBrowHeight,
        Cue::OuterBrowHeight,
        Cue::BrowGap,
        Cue::EyeOpening,
        Cue::MouthOpening,
        Cue::MouthWidth,
        Cue::MouthCornerLift,
        Cue::UpperLipRaise,
        Cue::LipThickness,
    ];

    /// The name in data sets.
    pub fn name(self) -> &'static str {
        match self {
            Cue::InnerBrowHeight => "inner_brow_height",
            Cue::OuterBrowHeight => "outer_brow_height",
            Cue::BrowGap => "brow_gap",
            Cue::EyeOpening => "eye_opening",
            Cue::MouthOpening => "mouth_opening",
            Cue::MouthWidth => "mouth_width",
            Cue::MouthCornerLift => "mouth_corner_lift",
            Cue::UpperLipRaise => "upper_lip_raise",
            Cue::LipThickness => "lip_thickness",
        }
    }
}

/// Which way a cue departs from a neutral face.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    /// More of it.
    More,
    /// Less of it.
    Less,
}

impl Direction {
    /// +1 or -1.
    pub fn sign(self) -> f32 {
        match self {
            Direction::More => 1.0,
            Direction::Less => -1.0,
        }
    }
}

/// One statement about a face, such as "the brows are drawn together".
pub type Claim = (Cue, Direction);

/// Whether a claim agrees with the measured cues of a face (order of [`Cue::ALL`]).
pub fn claim_is_right((cue, direction): Claim, measured: &[f32; Cue::COUNT]) -> bool {
    measured[cue as usize] * direction.sign() >= RIGHT_BEYOND
}

/// The emotions that rationales can name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // the names are the documentation
pub enum Emotion {
    Anger,
    Disgust,
    Fear,
    Joy,
    Neutral,
    Sadness,
    Surprise,
}

impl Emotion {
    /// Every emotion.
    pub const ALL: [Emotion; 7] = [
        Emotion::Anger,
        Emotion::Disgust,
        Emotion::Fear,
        Emotion::Joy,
        Emotion::Neutral,
        Emotion::Sadness,
        Emotion::Surprise,
    ];

    /// The emotion that a label of a data set means, in any of its usual spellings.
    pub fn from_label(label: &str) -> Option<Emotion> {
        Some(match label.trim().to_lowercase().as_str() {
            "angry" | "anger" => Emotion::Anger,
            "disgust" | "disgusted" => Emotion::Disgust,
            "fear" | "fearful" => Emotion::Fear,
            "happy" | "happiness" | "joy" => Emotion::Joy,
            "neutral" => Emotion::Neutral,
            "sad" | "sadness" => Emotion::Sadness,
            "surprise" | "surprised" => Emotion::Surprise,
            _ => return None,
        })
    }

    /// Its id among the 28 labels of GoEmotions (Demszky et al. 2020).
    pub fn goemotions_id(self) -> u32 {
        match self {
            Emotion::Anger => 2,
            Emotion::Disgust => 11,
            Emotion::Fear => 14,
            Emotion::Joy => 17,
            Emotion::Neutral => 27,
            Emotion::Sadness => 25,
            Emotion::Surprise => 26,
        }
    }
}

/// Which wordings to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bank {
    /// Wordings that models are trained on.
    Train,
    /// Wordings that no model is trained on.
    HeldOut,
}

/// A part of the face as the subject of a clause, with the states that say something of it.
struct Subject {
    /// With its article, in lower case.
    text: &'static str,
    plural: bool,
    /// Both banks may use a subject, so that a held-out wording can differ in its state alone.
    bank: Option<Bank>,
    states: &'static [States],
}

/// Ways to say one claim of a subject.
struct States {
    claim: Claim,
    train: &'static [&'static str],
    held_out: &'static [&'static str],
}

impl States {
    fn of(&self, bank: Bank) -> &'static [&'static str] {
        match bank {
            Bank::Train => self.train,
            Bank::HeldOut => self.held_out,
        }
    }
}

use Cue::*;
use Direction::{Less, More};

const fn states(
    cue: Cue,
    direction: Direction,
    train: &'static [&'static str],
    held_out: &'static [&'static str],
) -> States {
    States { claim: (cue, direction), train, held_out }
}

const INNER_BROW: &[States] = &[
    states(InnerBrowHeight, More, &["raised", "lifted", "pulled up"], &["tugged upward", "arched"]),
    states(InnerBrowHeight, Less, &["lowered", "pulled down", "pressed down"], &["pushed downward", "sunken"]),
];
const OUTER_BROW: &[States] = &[
    states(OuterBrowHeight, More, &["raised", "lifted", "pulled up"], &["tugged upward", "arched"]),
    states(OuterBrowHeight, Less, &["lowered", "pulled down", "pressed down"], &["pushed downward", "sunken"]),
];
const BROWS: &[States] = &[
    states(BrowGap, Less, &["drawn together", "pulled together", "knitted"], &["squeezed together", "furrowed"]),
    states(BrowGap, More, &["spread apart", "far apart", "wide apart"], &["well separated", "set apart"]),
];
const EYES: &[States] = &[
    states(EyeOpening, More, &["wide open", "opened wide", "widened"], &["drawn far open", "round and big"]),
    states(EyeOpening, Less, &["narrowed", "half closed", "squeezed"], &["pinched", "screwed up"]),
];
const LIDS: &[States] = &[
    states(EyeOpening, More, &["raised", "pulled back"], &["hoisted"]),
    states(EyeOpening, Less, &["lowered", "drawn down"], &["sinking"]),
];
const MOUTH: &[States] = &[
    states(MouthOpening, More, &["open", "opened", "wide open"], &["agape", "gaping"]),
    states(MouthOpening, Less, &["closed", "shut"], &["clamped", "sealed"]),
    states(MouthWidth, More, &["stretched wide", "wide", "pulled to the sides"], &["broad", "drawn out sideways"]),
    states(MouthWidth, Less, &["narrow", "drawn small", "pulled in"], &["puckered", "contracted"]),
];
const JAW: &[States] = &[states(MouthOpening, More, &["dropped"], &["slack"])];
const CORNERS: &[States] = &[
    states(MouthCornerLift, More, &["lifted", "turned up", "raised"], &["curled upward", "tilted up"]),
    states(MouthCornerLift, Less, &["turned down", "pulled down", "drooping"], &["sagging", "tilted down"]),
];
const UPPER_LIP: &[States] = &[
    states(UpperLipRaise, More, &["raised", "lifted", "pulled up"], &["curled upward", "hitched"]),
    states(UpperLipRaise, Less, &["lowered", "pulled down", "held low"], &["pushed downward", "flattened"]),
];
const LIPS: &[States] = &[
    states(MouthOpening, More, &["parted", "apart"], &["separated"]),
    states(MouthOpening, Less, &["closed", "held together"], &["sealed"]),
    states(LipThickness, More, &["full", "thick"], &["plump", "fleshy"]),
    states(LipThickness, Less, &["thin", "pressed together", "tight"], &["compressed", "tucked away"]),
];

const fn subject(text: &'static str, plural: bool, bank: Option<Bank>, states: &'static [States]) -> Subject {
    Subject { text, plural, bank, states }
}

const SUBJECTS: &[Subject] = &[
    subject("the inner brows", true, None, INNER_BROW),
    subject("the inner ends of the brows", true, Some(Bank::Train), INNER_BROW),
    subject("the inner corners of the brows", true, Some(Bank::HeldOut), INNER_BROW),
    subject("the outer brows", true, None, OUTER_BROW),
    subject("the outer ends of the brows", true, Some(Bank::Train), OUTER_BROW),
    subject("the tails of the brows", true, Some(Bank::HeldOut), OUTER_BROW),
    subject("the brows", true, None, BROWS),
    subject("the eyebrows", true, Some(Bank::Train), BROWS),
    subject("the eyes", true, None, EYES),
    subject("the eyelids", true, None, LIDS),
    subject("the mouth", false, None, MOUTH),
    subject("the jaw", false, None, JAW),
    subject("the mouth corners", true, Some(Bank::Train), CORNERS),
    subject("the corners of the mouth", true, Some(Bank::Train), CORNERS),
    subject("the lip corners", true, None, CORNERS),
    subject("both ends of the mouth", true, Some(Bank::HeldOut), CORNERS),
    subject("the upper lip", false, None, UPPER_LIP),
    subject("the top lip", false, Some(Bank::HeldOut), UPPER_LIP),
    subject("the lips", true, None, LIPS),
];

/// Claims said with a noun alone.
struct NounPhrase {
    claim: Claim,
    train: &'static [&'static str],
    held_out: &'static [&'static str],
}

const fn noun(
    cue: Cue,
    direction: Direction,
    train: &'static [&'static str],
    held_out: &'static [&'static str],
) -> NounPhrase {
    NounPhrase { claim: (cue, direction), train, held_out }
}

const NOUN_PHRASES: &[NounPhrase] = &[
    noun(InnerBrowHeight, More, &["raised inner brows"], &["inner brows that go up"]),
    noun(InnerBrowHeight, Less, &["lowered inner brows"], &["inner brows that go down"]),
    noun(OuterBrowHeight, More, &["raised outer brows"], &["outer brows that go up"]),
    noun(OuterBrowHeight, Less, &["lowered outer brows"], &["outer brows that go down"]),
    noun(BrowGap, Less, &["knitted brows"], &["a furrowed brow"]),
    noun(BrowGap, More, &["widely spaced brows"], &["a broad gap between the brows"]),
    noun(EyeOpening, More, &["wide eyes"], &["big round eyes"]),
    noun(EyeOpening, Less, &["narrow eyes"], &["squinting eyes"]),
    noun(MouthOpening, More, &["an open mouth", "parted lips"], &["a gaping mouth"]),
    noun(MouthOpening, Less, &["a closed mouth"], &["sealed lips"]),
    noun(MouthWidth, More, &["a wide mouth"], &["a broad mouth"]),
    noun(MouthWidth, Less, &["a narrow mouth"], &["a puckered mouth"]),
    noun(MouthCornerLift, More, &["raised mouth corners"], &["mouth corners that go up"]),
    noun(MouthCornerLift, Less, &["lowered mouth corners"], &["mouth corners that go down"]),
    noun(UpperLipRaise, More, &["a raised upper lip"], &["an upper lip that goes up"]),
    noun(UpperLipRaise, Less, &["a lowered upper lip"], &["an upper lip that goes down"]),
    noun(LipThickness, More, &["full lips"], &["plump lips"]),
    noun(LipThickness, Less, &["thin lips"], &["compressed lips"]),
];

/// Adverbs for a cue just beyond the threshold, well beyond it, and far beyond it.
fn adverbs(bank: Bank, strength: f32) -> &'static [&'static str] {
    match (bank, strength) {
        (Bank::Train, ..1.2) => &["slightly ", "a little ", "", ""],
        (Bank::Train, ..2.2) => &["clearly ", "visibly ", "", ""],
        (Bank::Train, _) => &["strongly ", "very clearly ", "", ""],
        (Bank::HeldOut, ..1.2) => &["somewhat ", "faintly "],
        (Bank::HeldOut, ..2.2) => &["evidently ", "distinctly "],
        (Bank::HeldOut, _) => &["unmistakably ", "intensely "],
    }
}

/// Frames of a sentence that states two claims. `{A}`, `{B}`: a whole clause; `{a}`, `{b}`: a clause without its verb
/// ("the brows drawn together") or a noun phrase.
fn pair_frames(bank: Bank) -> &'static [&'static str] {
    match bank {
        Bank::Train => &[
            "{A} and {B}.",
            "{A}, and {B}.",
            "{A} while {B}.",
            "With {a}, {B}.",
            "With {a} and {b}, the face has a clear look.",
            "One sees {a} and {b}.",
            "The face has {a} and {b}.",
            "In this face {A} and {B}.",
        ],
        Bank::HeldOut => &[
            "{A}, whereas {B}.",
            "Notice that {A}, with {b}.",
            "What stands out is that {A} and that {B}.",
            "Having {a}, this head also has {b}.",
        ],
    }
}

/// Frames of a sentence that states one claim.
fn single_frames(bank: Bank) -> &'static [&'static str] {
    match bank {
        Bank::Train => &["{A}.", "{A}.", "Also, {A}.", "One sees {a}.", "The face has {a}.", "In this face {A}."],
        Bank::HeldOut => {
            &["Notice that {A}.", "What stands out is that {A}.", "Moreover {A} there.", "I can spot {a}."]
        }
    }
}

/// Said of a measured face none of whose cues stands out.
fn resting_sentences(bank: Bank) -> &'static [&'static str] {
    match bank {
        Bank::Train => &["No feature stands out.", "The features are at rest.", "Every feature is in its usual place."],
        Bank::HeldOut => &["Nothing departs from the ordinary.", "All the parts sit where they normally do."],
    }
}

/// Said of a face that could not be measured: no claim at all.
fn unmeasured_sentences(bank: Bank) -> &'static [&'static str] {
    match bank {
        Bank::Train => &[
            "The single features are hard to make out.",
            "The details of the face are not clear.",
            "Only the face as a whole can be judged.",
        ],
        Bank::HeldOut => &["Particulars cannot be discerned.", "It is difficult to pick out any one element."],
    }
}

/// Words for an emotion.
struct Words {
    nouns: &'static [&'static str],
    adjectives: &'static [&'static str],
    /// Whole sentences that fit this emotion alone.
    sentences: &'static [&'static str],
}

fn words(bank: Bank, emotion: Emotion) -> Words {
    let (nouns, adjectives, sentences): (&[&str], &[&str], &[&str]) = match (bank, emotion) {
        (Bank::Train, Emotion::Joy) => (
            &["joy", "happiness", "delight", "pleasure", "good cheer"],
            &["happy", "joyful", "delighted", "cheerful", "glad", "pleased"],
            &["This is a happy smile.", "Something good must have happened.", "It is a warm and joyful look."],
        ),
        (Bank::Train, Emotion::Anger) => (
            &["anger", "rage", "fury", "hostility"],
            &["angry", "furious", "enraged", "hostile", "mad"],
            &["This is an angry stare.", "Someone has made them mad.", "It is a hard and hostile look."],
        ),
        (Bank::Train, Emotion::Disgust) => (
            &["disgust", "revulsion", "loathing", "strong aversion"],
            &["disgusted", "revolted", "sickened", "repelled"],
            &[
                "This is a look of pure disgust.",
                "Something smells or tastes bad to them.",
                "They want to turn away in disgust.",
            ],
        ),
        (Bank::Train, Emotion::Fear) => (
            &["fear", "fright", "dread", "terror"],
            &["afraid", "scared", "frightened", "fearful", "terrified"],
            &["This is a frightened stare.", "Something seems to threaten them.", "It is a tense and fearful look."],
        ),
        (Bank::Train, Emotion::Sadness) => (
            &["sadness", "sorrow", "unhappiness", "misery"],
            &["sad", "unhappy", "sorrowful", "miserable", "downcast"],
            &["This is a sad and heavy look.", "They may be close to tears.", "Something makes them very unhappy."],
        ),
        (Bank::Train, Emotion::Surprise) => (
            &["surprise", "astonishment", "amazement", "shock"],
            &["surprised", "astonished", "amazed", "startled", "shocked"],
            &[
                "This is a surprised look.",
                "They did not expect this at all.",
                "Something sudden has caught them off guard.",
            ],
        ),
        (Bank::Train, Emotion::Neutral) => (
            &["calm", "a neutral mood", "no strong feeling", "composure"],
            &["calm", "neutral", "composed", "unmoved", "indifferent"],
            &["This is a plain and neutral look.", "Nothing seems to move them.", "No emotion stands out."],
        ),
        (Bank::HeldOut, Emotion::Joy) => {
            (&["elation", "bliss", "glee", "gladness"], &["overjoyed", "elated", "merry", "gleeful"], &[])
        }
        (Bank::HeldOut, Emotion::Anger) => {
            (&["wrath", "outrage", "ire", "indignation"], &["irate", "incensed", "livid", "seething"], &[])
        }
        (Bank::HeldOut, Emotion::Disgust) => {
            (&["repulsion", "distaste", "nausea", "repugnance"], &["repulsed", "nauseated", "grossed out"], &[])
        }
        (Bank::HeldOut, Emotion::Fear) => {
            (&["panic", "horror", "alarm", "a scare"], &["panicked", "petrified", "horrified", "spooked"], &[])
        }
        (Bank::HeldOut, Emotion::Sadness) => (
            &["melancholy", "heartache", "dejection", "gloom"],
            &["heartbroken", "dejected", "mournful", "gloomy"],
            &[],
        ),
        (Bank::HeldOut, Emotion::Surprise) => (
            &["sheer disbelief", "a jolt of the unexpected", "bewildered wonder"],
            &["stunned", "taken aback", "dumbfounded", "astounded"],
            &[],
        ),
        (Bank::HeldOut, Emotion::Neutral) => (
            &["an even temper", "no particular emotion", "an everyday state of mind"],
            &["impassive", "matter-of-fact", "expressionless", "unaffected"],
            &[],
        ),
    };
    Words { nouns, adjectives, sentences }
}

/// More nouns, and more adjectives, for an emotion: the verifier learns them and rationales do not use them, since a
/// reader must know more words than a writer. None of them is in the held-out bank.
fn reading_words(emotion: Emotion) -> [&'static str; 2] {
    match emotion {
        Emotion::Joy => [
            "cheer, enjoyment, contentment, jubilation, gaiety, mirth, euphoria, high spirits, rapture, cheerfulness, \
             rejoicing, exultation, exhilaration, ecstasy, amusement, merriment, satisfaction, pure fun, laughter, \
             a good mood, a big smile, thorough enjoyment, jolliness, felicity, well-being",
            "content, jolly, jubilant, thrilled, ecstatic, upbeat, sunny, euphoric, in high spirits, blissful, beaming, \
             exultant, joyous, radiant, amused, exhilarated, over the moon, on cloud nine, in a good mood, smiling, \
             laughing, full of cheer, lighthearted, satisfied, having fun",
        ],
        Emotion::Anger => [
            "resentment, hatred, aggression, animosity, venom, bad temper, spite, outright anger, vexation, irritation, \
             exasperation, temper, enmity, ferocity, a burning grudge, bitterness, annoyance, hot temper, fierceness, \
             righteous anger, bad blood, belligerence, cold fury, an outburst of rage, displeasure",
            "fuming, infuriated, resentful, cross, aggressive, spiteful, raging, boiling with rage, up in arms, outraged, \
             indignant, wrathful, exasperated, irritated, annoyed, vexed, bitter, hateful, fierce, belligerent, \
             mad as hell, foaming at the mouth, hot-tempered, hopping mad, provoked, ticked off",
        ],
        Emotion::Disgust => [
            "abhorrence, queasiness, detestation, aversion, sickness, deep dislike, abomination, contempt and disgust, \
             squeamishness, odium, a foul taste, a bad smell, antipathy, utter loathing, a sick feeling, the urge to \
             vomit, a wrinkled nose of disgust, offence at something foul",
            "appalled, queasy, put off, turned off, sick to the stomach, full of loathing, squeamish, averse, offended by \
             the smell, nauseous, ready to throw up, about to vomit, displeased by the taste, full of revulsion, \
             creeped out and disgusted, sick of it, gagging",
        ],
        Emotion::Fear => [
            "trepidation, fearfulness, mortal fear, cold dread, foreboding, apprehension, timidity, anxiety, nervousness, \
             consternation, phobia, cold feet, cowardice, worry and fear, uneasiness, distress and fear, a threat, \
             being hunted, hysteria, the creeps, jitters, a nightmare",
            "terror-stricken, threatened, intimidated, shaken, full of dread, scared stiff, aghast, timid, alarmed, \
             panicky, anxious, apprehensive, nervous, worried, trembling, on edge, freaked \
             out, frightened to death, haunted, uneasy, afraid for their life, cowering",
        ],
        Emotion::Sadness => [
            "woe, despair, low spirits, anguish, wretchedness, despondency, bitter tears, grief, mourning, a broken \
             heart, depression, loneliness, regret, tearfulness, hopelessness, desolation, heartbreak, unhappy \
             thoughts, the blues, gloominess, a loss, disappointment, crying, weeping, hurt",
            "downhearted, tearful, depressed, blue, crestfallen, wretched, forlorn, despondent, down, \
             melancholic, grieving, in tears, hopeless, lonely, low, brokenhearted, weepy, desolate, dispirited, \
             disheartened, hurt, sorrow-stricken, in mourning, crying",
        ],
        Emotion::Surprise => [
            "incredulity, a sudden start, startlement, being caught unawares, stupefaction, wonder, disbelief, a bolt \
             from the blue, the unexpected, open-mouthed wonder, amazed disbelief, bewilderment, a big surprise, \
             something unforeseen, an unexpected turn, wide-eyed wonder, a shocking revelation",
            "flabbergasted, speechless, caught off guard, thunderstruck, jolted, incredulous, staggered, stupefied, \
             dazed, blown away, floored, taken by surprise, bewildered, awestruck, caught unawares, unprepared for \
             it, agape with amazement, dumbstruck, gobsmacked, wide-eyed, nonplussed, startled out of their wits",
        ],
        Emotion::Neutral => [
            "indifference, equanimity, quiet, nothing in particular, steadiness, a resting state, no emotion at all, an \
             ordinary mood, neutrality, an absence of feeling, calmness, routine, a level mood, tranquillity, a plain \
             state, a blank look, stillness, a usual mood, an average day, detachment, serenity",
            "relaxed, even, collected, blank, uninvolved, serene, steady, undisturbed, emotionless, unemotional, \
             level-headed, at rest, tranquil, deadpan, detached, placid, ordinary, in a normal mood, unconcerned, \
             neither happy nor sad, unexcited, stoic, plain, poker-faced, indifferent to it all",
        ],
    }
}

/// Frames around a noun that the verifier learns and rationales do not use.
const READING_NOUN_FRAMES: &[&str] = &[
    "there is {} in this face.",
    "we see {} here.",
    "a clear case of {}.",
    "{} is written all over the face.",
    "the whole face is full of {}.",
    "one can sense {} in the way they look.",
    "the scene is one of {}.",
    "such a face tells of {}.",
    "that is how {} looks.",
    "the main emotion is {}.",
    "the woman expresses {}.",
    "the man is showing {}.",
    "his voice and his look betray {}.",
    "nothing but {} could explain this.",
    "all of this indicates {}.",
    "these are typical signs of {}.",
    "it is reasonable to conclude that the person feels {}.",
    "I believe that we are looking at {}.",
    "if I had to name it, I would call it {}.",
    "what she feels must be {}.",
    "he is overcome by {}.",
    "from what can be seen, {} is the most likely emotion.",
    "the answer is {}.",
    "this reflects a feeling of {}.",
    "you could say that there is {} in the air.",
    "most viewers will think of {}.",
    "it conjures up {}.",
    "the look in her eyes suggests a sense of {}.",
];

/// Frames around an adjective that the verifier learns and rationales do not use.
const READING_FRAMES: &[&str] = &[
    "she is {}.",
    "he looks {}.",
    "the woman seems to be {}.",
    "the man sounds {}.",
    "the child is visibly {}.",
    "clearly, somebody is {} here.",
    "what we see is a person who is {}.",
    "their mood is best called {}.",
    "most people would call this {}.",
    "he or she has become {}.",
    "I think that they are {}.",
    "everything about them is {}.",
    "being {} makes people look like that.",
    "only a person who is {} looks so.",
    "we can infer that he must be {}.",
    "a stranger would tell you that this person is {}.",
    "I am fairly sure that this someone was {} at the time.",
    "it would be fair to say that they were {}.",
    "the one in the picture looks rather {}.",
    "if you ask me, he or she is {}.",
    "it seems to me that she might be {}.",
    "you would guess that the girl was {}.",
    "the speaker is {}, as far as one can tell.",
    "in my opinion the boy feels {}.",
    "one gets the idea that he has been {}.",
    "it could well be that they are {}.",
    "one word for how she looks is {}.",
    "nobody would doubt that the person is {}.",
];

/// Frames around what a face shows, stated as [`cue_sentence`] does without its full stop, and a sentence that names an
/// emotion: rationales often say both in one breath.
const READING_BOTH: &[&str] = &["{}, so {}", "{}, and {}", "{}: {}", "{}; {}", "since {}, {}", "{}, which is why {}"];

/// People, what they do, and where: a scene that names no emotion.
const SCENES: [&[&str]; 3] = [
    &[
        "a man",
        "a woman",
        "the person",
        "an older man",
        "a young woman",
        "the speaker",
        "someone",
        "a child",
        "the boy",
    ],
    &[
        "sits",
        "stands",
        "is talking",
        "is wearing a dark shirt",
        "wears glasses",
        "holds a phone",
        "turns the head to the left",
        "looks at the camera",
        "looks to the side",
        "has long hair",
        "is seen from the front",
        "is speaking to somebody",
        "moves a hand",
        "is facing us",
        "says a few words",
    ],
    &[
        "",
        " in a room",
        " at a table",
        " in front of a white wall",
        " outdoors",
        " in the first seconds",
        " during the clip",
        " near a window",
        " on the left of the picture",
        " next to another person",
        " in an office",
    ],
];

fn noun_frames(bank: Bank) -> &'static [&'static str] {
    match bank {
        Bank::Train => &[
            "these signs point to {}.",
            "this speaks of {}.",
            "the expression suggests {}.",
            "it all adds up to {}.",
            "this is a look of {}.",
            "the impression is one of {}.",
            "the face shows {}.",
            "the feeling here is {}.",
            "what comes through is {}.",
        ],
        Bank::HeldOut => &[
            "everything here hints at {}.",
            "I would describe it as {}.",
            "the best word for that would be {}.",
            "one reads {} in them.",
            "the picture conveys {}.",
        ],
    }
}

fn adjective_frames(bank: Bank) -> &'static [&'static str] {
    match bank {
        Bank::Train => &[
            "the person seems {}.",
            "they look {}.",
            "this person appears {}.",
            "it is the face of someone {}.",
            "the person is most likely {}.",
            "they must feel {}.",
            "the person feels {}.",
            "they come across as {}.",
        ],
        Bank::HeldOut => &[
            "I would say the subject is {}.",
            "anyone might think that she or he is {}.",
            "my guess is that a viewer would find him or her {}.",
            "whoever sat for it was {}.",
        ],
    }
}

fn lead_ins(bank: Bank) -> &'static [&'static str] {
    match bank {
        Bank::Train => &["", "", "Overall, ", "Taken together, ", "So ", "In short, "],
        Bank::HeldOut => &["", "Summing up, ", "On the whole, ", "Judging by that, "],
    }
}

fn pick<'a>(rng: &mut impl Rng, from: &[&'a str]) -> &'a str {
    from.choose(rng).copied().unwrap_or_default()
}

/// First letter in upper case.
fn capitalised(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

/// First letter in lower case, but for "I".
fn uncapitalised(text: &str) -> String {
    let mut letters = text.chars();
    match letters.next() {
        Some(first) if !text.starts_with("I ") => first.to_lowercase().chain(letters).collect(),
        _ => text.to_owned(),
    }
}

/// A clause that states a claim: with its verb ("the mouth is open"), or without ("the mouth open", "parted lips").
fn clause(rng: &mut impl Rng, bank: Bank, claim: Claim, strength: f32, with_verb: bool) -> String {
    let nouns = NOUN_PHRASES.iter().filter(|n| n.claim == claim).flat_map(|n| match bank {
        Bank::Train => n.train,
        Bank::HeldOut => n.held_out,
    });
    if !with_verb && rng.random_bool(0.5) {
        let nouns: Vec<&str> = nouns.copied().collect();
        return pick(rng, &nouns).to_string();
    }
    let choices: Vec<(&Subject, &'static str)> = SUBJECTS
        .iter()
        .filter(|s| s.bank.is_none_or(|b| b == bank))
        .flat_map(|s| s.states.iter().filter(|st| st.claim == claim).map(move |st| (s, st)))
        .flat_map(|(s, st)| st.of(bank).iter().map(move |&state| (s, state)))
        .collect();
    let Some(&(subject, state)) = choices.choose(rng) else { return String::new() };
    let adverb = pick(rng, adverbs(bank, strength));
    if !with_verb {
        return format!("{} {adverb}{state}", subject.text);
    }
    let verbs = match (bank, subject.plural) {
        (Bank::Train, true) => ["are", "are", "look", "appear"],
        (Bank::Train, false) => ["is", "is", "looks", "appears"],
        (Bank::HeldOut, true) => ["stay", "remain", "seem", "are being"],
        (Bank::HeldOut, false) => ["stays", "remains", "seems", "is being"],
    };
    format!("{} {} {adverb}{state}", subject.text, pick(rng, &verbs))
}

/// A sentence that states one or two claims; `strength` is how far each lies from a neutral face.
pub fn cue_sentence(rng: &mut impl Rng, bank: Bank, claims: &[(Claim, f32)]) -> String {
    let mut text = match claims {
        [] => return pick(rng, resting_sentences(bank)).to_string(),
        [_] => pick(rng, single_frames(bank)).to_string(),
        _ => pick(rng, pair_frames(bank)).to_string(),
    };
    for (&(claim, strength), (whole, part)) in claims.iter().zip([("{A}", "{a}"), ("{B}", "{b}")]) {
        if text.contains(whole) {
            text = text.replace(whole, &clause(rng, bank, claim, strength, true));
        } else {
            text = text.replace(part, &clause(rng, bank, claim, strength, false));
        }
    }
    capitalised(&text)
}

/// What is said of a face that could not be measured: no claim at all.
pub fn unmeasured_sentence(rng: &mut impl Rng, bank: Bank) -> String {
    pick(rng, unmeasured_sentences(bank)).to_string()
}

/// Bytes at the start of a rationale in which it says that nothing could be made out; 0 where it does not say so.
pub fn unmeasured_start(rationale: &str) -> usize {
    let mut sentences = unmeasured_sentences(Bank::Train).iter();
    sentences.find(|sentence| rationale.starts_with(**sentence)).map_or(0, |sentence| sentence.len())
}

/// Every sentence of the training bank that is said as it stands, with the emotion it names: neutral where it names
/// none.
pub fn fixed_sentences() -> impl Iterator<Item = (&'static str, Emotion)> {
    let plain = resting_sentences(Bank::Train).iter().chain(unmeasured_sentences(Bank::Train));
    let named = Emotion::ALL
        .into_iter()
        .flat_map(|emotion| words(Bank::Train, emotion).sentences.iter().map(move |&sentence| (sentence, emotion)));
    plain.map(|&sentence| (sentence, Emotion::Neutral)).chain(named)
}

/// Every term for an emotion, of both banks and of readers, and whether it is a noun.
#[cfg(test)]
pub(crate) fn emotion_terms(emotion: Emotion) -> Vec<(&'static str, bool)> {
    let written = [Bank::Train, Bank::HeldOut].into_iter().flat_map(|bank| {
        let Words { nouns, adjectives, .. } = words(bank, emotion);
        nouns.iter().map(|&noun| (noun, true)).chain(adjectives.iter().map(|&adjective| (adjective, false)))
    });
    let [nouns, adjectives] = reading_words(emotion);
    let read = nouns.split(", ").map(|noun| (noun, true)).chain(adjectives.split(", ").map(|word| (word, false)));
    written.chain(read).collect()
}

/// A sentence that names an emotion.
pub fn emotion_sentence(rng: &mut impl Rng, bank: Bank, emotion: Emotion) -> String {
    let Words { nouns, adjectives, sentences } = words(bank, emotion);
    if !sentences.is_empty() && rng.random_bool(0.1) {
        return pick(rng, sentences).to_string();
    }
    frame_words(rng, bank, nouns, adjectives)
}

/// As [`emotion_sentence`] of [`Bank::Train`], with the further words and frames that only a reader needs to know.
pub fn reading_sentence(rng: &mut impl Rng, emotion: Emotion) -> String {
    let own = words(Bank::Train, emotion);
    let [more_nouns, more_adjectives] = reading_words(emotion).map(|words| words.split(", ").collect::<Vec<_>>());
    let (nouns, adjectives) =
        if rng.random_bool(0.25) { (own.nouns, own.adjectives) } else { (&more_nouns[..], &more_adjectives[..]) };
    let sentence = if rng.random_bool(0.4) {
        frame_words(rng, Bank::Train, nouns, adjectives)
    } else {
        let (frames, terms) =
            if rng.random_bool(0.5) { (READING_NOUN_FRAMES, nouns) } else { (READING_FRAMES, adjectives) };
        capitalised(&pick(rng, frames).replace("{}", pick(rng, terms)))
    };
    if rng.random_bool(0.85) {
        return sentence;
    }
    let (claim, strength) = any_claim(rng);
    let shown = clause(rng, Bank::Train, claim, strength, true);
    let both = pick(rng, READING_BOTH).replacen("{}", &shown, 1).replacen("{}", &uncapitalised(&sentence), 1);
    capitalised(&both)
}

/// A sentence that names an emotion in a held-out wording, with one of the words that the verifier learns.
pub fn reworded_sentence(rng: &mut impl Rng, emotion: Emotion) -> String {
    let own = words(Bank::Train, emotion);
    if rng.random_bool(0.25) {
        return frame_words(rng, Bank::HeldOut, own.nouns, own.adjectives);
    }
    let [nouns, adjectives] = reading_words(emotion).map(|words| words.split(", ").collect::<Vec<_>>());
    frame_words(rng, Bank::HeldOut, &nouns, &adjectives)
}

/// A sentence about a scene that names no emotion, for the verifier.
pub fn scene_sentence(rng: &mut impl Rng) -> String {
    capitalised(&format!("{}.", SCENES.map(|part| pick(rng, part)).join(" ").replace("  ", " ").trim_end()))
}

/// A claim about any cue, with how far it lies from a neutral face.
pub fn any_claim(rng: &mut impl Rng) -> (Claim, f32) {
    let cue = Cue::ALL[rng.random_range(0..Cue::COUNT)];
    ((cue, if rng.random_bool(0.5) { More } else { Less }), rng.random_range(STATED_BEYOND..3.0))
}

fn frame_words(rng: &mut impl Rng, bank: Bank, nouns: &[&str], adjectives: &[&str]) -> String {
    let (frames, terms) =
        if rng.random_bool(0.5) { (noun_frames(bank), nouns) } else { (adjective_frames(bank), adjectives) };
    let sentence = pick(rng, frames).replace("{}", pick(rng, terms));
    capitalised(&format!("{}{sentence}", pick(rng, lead_ins(bank))))
}

/// The claims a face bears out, with how far each cue lies from a neutral face.
pub fn claims_of(measured: &[f32; Cue::COUNT]) -> Vec<(Claim, f32)> {
    Cue::ALL
        .into_iter()
        .zip(measured)
        .filter(|(_, v)| v.abs() > STATED_BEYOND)
        .map(|(cue, &v)| ((cue, if v > 0.0 { More } else { Less }), v.abs()))
        .collect()
}

/// The text between `<think>` and `</think>` for a face with the given measured cues (none where they could not be
/// measured): two or three cues in one or two sentences, the salient ones likelier, in the order of [`Cue::ALL`]; then
/// one or two sentences that draw `emotion` from them.
pub fn rationale(rng: &mut impl Rng, bank: Bank, measured: Option<&[f32; Cue::COUNT]>, emotion: Emotion) -> String {
    let mut sentences = Vec::new();
    match measured {
        None => sentences.push(unmeasured_sentence(rng, bank)),
        Some(measured) => {
            let mut claims = claims_of(measured);
            let wanted = rng.random_range(2..=3);
            let mut chosen = Vec::new();
            while chosen.len() < wanted && !claims.is_empty() {
                // The square makes the most telling cues the usual ones without ever excluding the rest.
                let indices: Vec<usize> = (0..claims.len()).collect();
                let Ok(&at) = indices.choose_weighted(rng, |&i| claims[i].1 * claims[i].1) else { break };
                chosen.push(claims.swap_remove(at));
            }
            // From the brows down to the mouth, always: a writer that has passed a feature does not come back to it.
            chosen.sort_by_key(|(claim, _)| claim.0);
            if chosen.is_empty() {
                sentences.push(cue_sentence(rng, bank, &[]));
            }
            let mut rest = chosen.as_slice();
            while !rest.is_empty() {
                let take = if rest.len() >= 2 && (rest.len() == 3 || rng.random_bool(0.7)) { 2 } else { 1 };
                sentences.push(cue_sentence(rng, bank, &rest[..take]));
                rest = &rest[take..];
            }
        }
    }
    sentences.push(emotion_sentence(rng, bank, emotion));
    if rng.random_bool(0.35) {
        sentences.push(emotion_sentence(rng, bank, emotion));
    }
    sentences.join(" ")
}

/// `text[at..]` begins with `phrase` and no word goes on before or behind it.
fn phrase_at(text: &str, at: usize, phrase: &str) -> bool {
    let letter = |c: char| c.is_alphanumeric();
    text[at..].starts_with(phrase)
        && !text[..at].chars().next_back().is_some_and(letter)
        && !text[at + phrase.len()..].chars().next().is_some_and(letter)
}

/// Reads the claims back out of a text, in the order they stand there. Knows every wording of both banks, in any
/// combination of subject and state: a subject claims what the states behind it, up to the next subject or the end
/// of the sentence, say of it.
pub fn cue_claims(text: &str) -> Vec<Claim> {
    let text = text.to_lowercase();
    let mut claims = Vec::new();
    let mut subject: Option<&[States]> = None;
    let mut at = 0;
    while at < text.len() {
        let step = text[at..].chars().next().map_or(1, char::len_utf8);
        if matches!(text.as_bytes()[at], b'.' | b'!' | b'?') {
            subject = None;
        }
        // Longest wording first, so that "the mouth corners" is not taken for "the mouth".
        let noun = longest(&text, at, NOUN_PHRASES.iter().flat_map(|n| both(n.train, n.held_out, n.claim)));
        let next = longest(&text, at, SUBJECTS.iter().map(|s| (s.text, s.states)));
        let state = subject
            .and_then(|states| longest(&text, at, states.iter().flat_map(|s| both(s.train, s.held_out, s.claim))));
        at += if let Some((phrase, claim)) = noun {
            claims.push(claim);
            subject = None;
            phrase.len()
        } else if let Some((phrase, states)) = next {
            subject = Some(states);
            phrase.len()
        } else if let Some((phrase, claim)) = state {
            claims.push(claim);
            phrase.len()
        } else {
            step
        };
    }
    claims
}

fn both(
    train: &'static [&'static str],
    held_out: &'static [&'static str],
    claim: Claim,
) -> impl Iterator<Item = (&'static str, Claim)> {
    train.iter().chain(held_out).map(move |&phrase| (phrase, claim))
}

fn longest<T>(text: &str, at: usize, phrases: impl Iterator<Item = (&'static str, T)>) -> Option<(&'static str, T)> {
    phrases.filter(|(phrase, _)| phrase_at(text, at, phrase)).max_by_key(|(phrase, _)| phrase.len())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeSet;

    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;

    const BANKS: [Bank; 2] = [Bank::Train, Bank::HeldOut];

    fn all_claims() -> impl Iterator<Item = Claim> {
        Cue::ALL.into_iter().flat_map(|cue| [(cue, More), (cue, Less)])
    }

    #[test]
    fn every_wording_of_both_banks_is_read_back() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for bank in BANKS {
            for first in all_claims() {
                let mut wordings = BTreeSet::new();
                for _ in 0..60 {
                    let text = cue_sentence(&mut rng, bank, &[(first, 1.5)]);
                    assert_eq!(cue_claims(&text), [first], "{text}");
                    wordings.insert(text);
                }
                assert!(wordings.len() >= 8, "{first:?} {bank:?}: {wordings:?}");
                for second in all_claims().filter(|s| s.0 != first.0) {
                    for strength in [0.7, 3.0] {
                        let text = cue_sentence(&mut rng, bank, &[(first, strength), (second, strength)]);
                        assert_eq!(cue_claims(&text), [first, second], "{text}");
                    }
                }
            }
        }
    }

    #[test]
    fn sentences_without_cues_claim_nothing() {
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        for bank in BANKS {
            for emotion in Emotion::ALL {
                for _ in 0..300 {
                    let text = emotion_sentence(&mut rng, bank, emotion);
                    assert_eq!(cue_claims(&text), [], "{text}");
                }
            }
            for text in resting_sentences(bank).iter().chain(unmeasured_sentences(bank)) {
                assert_eq!(cue_claims(text), [], "{text}");
            }
        }
    }

    #[test]
    fn sentences_to_read_are_whole() {
        let mut rng = ChaCha8Rng::seed_from_u64(4);
        for round in 0..3000 {
            let emotion = Emotion::ALL[round % 7];
            for text in [reading_sentence(&mut rng, emotion), scene_sentence(&mut rng)] {
                let clean = !text.contains("{}") && !text.contains("  ") && text.ends_with('.');
                assert!(clean && text.starts_with(char::is_uppercase), "{text:?}");
            }
            let claims = cue_claims(&scene_sentence(&mut rng));
            assert_eq!(claims, []);
        }
    }

    #[test]
    fn a_claim_needs_its_own_subject_and_sentence() {
        assert_eq!(cue_claims("The corners of the mouth are raised."), [(MouthCornerLift, More)]);
        assert_eq!(cue_claims("The mouth is wide open."), [(MouthOpening, More)]);
        assert_eq!(cue_claims("The mouth is wide. The eyes are kind, and all is open."), [(MouthWidth, More)]);
        assert_eq!(cue_claims("THE LIPS ARE THIN"), [(LipThickness, Less)]);
        assert_eq!(cue_claims("The lips thinly raised, the mouthpiece open, ends"), []);
        assert_eq!(cue_claims("The eyes… «widened»?! Ünïcode. É"), [(EyeOpening, More)]);
        assert_eq!(cue_claims(""), []);
    }

    #[test]
    fn a_claim_can_be_wrong() {
        let mut measured = [0.0; Cue::COUNT];
        measured[BrowGap as usize] = -0.8;
        assert!(claim_is_right((BrowGap, Less), &measured));
        assert!(!claim_is_right((BrowGap, More), &measured));
        assert!(!claim_is_right((EyeOpening, More), &measured), "a cue at rest bears out neither direction");
        assert!(!claim_is_right((EyeOpening, Less), &measured));
    }

    #[test]
    fn rationales_state_only_what_was_measured() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        for round in 0..2000 {
            let measured: [f32; Cue::COUNT] = std::array::from_fn(|_| rng.random_range(-2.0..2.0));
            let emotion = Emotion::ALL[round % 7];
            let text = rationale(&mut rng, Bank::Train, Some(&measured), emotion);
            let claims = cue_claims(&text);
            assert!(claims.len() <= 3 && claims.len() >= claims_of(&measured).len().min(2), "{text}");
            assert!(claims.is_sorted_by(|a, b| a.0 < b.0), "from the top down, nothing twice: {text}");
            for claim in claims {
                assert!(measured[claim.0 as usize] * claim.1.sign() > STATED_BEYOND, "{text}");
            }
            assert!(text.split_whitespace().count() < 70, "{text}");
        }
        let blind = rationale(&mut rng, Bank::Train, None, Emotion::Joy);
        assert_eq!(cue_claims(&blind), []);
        assert!(blind[..unmeasured_start(&blind)].ends_with('.'), "{blind}");
        assert_eq!(unmeasured_start("The mouth is open."), 0);
        assert!(!blind.is_empty());
    }

    #[test]
    fn the_banks_share_no_frame_and_no_emotion_word() {
        let gather = |bank: Bank| {
            let mut all: BTreeSet<&str> = BTreeSet::new();
            all.extend(noun_frames(bank));
            all.extend(adjective_frames(bank));
            all.extend(pair_frames(bank));
            all.extend(single_frames(bank));
            all.extend(resting_sentences(bank));
            all.extend(unmeasured_sentences(bank));
            for emotion in Emotion::ALL {
                let words = words(bank, emotion);
                all.extend(words.nouns.iter().chain(words.adjectives).chain(words.sentences));
                if bank == Bank::Train {
                    all.extend(reading_words(emotion).iter().flat_map(|words| words.split(", ")));
                    all.extend(READING_NOUN_FRAMES.iter().chain(READING_FRAMES));
                }
            }
            for states in SUBJECTS.iter().flat_map(|s| s.states) {
                all.extend(states.of(bank));
            }
            all
        };
        let train = gather(Bank::Train);
        let shared: Vec<_> = train.intersection(&gather(Bank::HeldOut)).copied().collect();
        assert_eq!(shared, Vec::<&str>::new());
        // Nor does a held-out word stand within a longer wording.
        let letters = |c: char| !c.is_alphabetic();
        let trained: BTreeSet<&str> = train.iter().flat_map(|text| text.split(letters)).collect();
        for emotion in Emotion::ALL {
            let Words { nouns, adjectives, .. } = words(Bank::HeldOut, emotion);
            for word in nouns.iter().chain(adjectives).filter(|word| !word.contains(letters)) {
                assert!(!trained.contains(word), "{word}");
            }
        }
    }

    #[test]
    fn labels_fold_to_emotions() {
        for (label, emotion) in [("angry", Emotion::Anger), ("Happiness", Emotion::Joy), (" sad ", Emotion::Sadness)] {
            assert_eq!(Emotion::from_label(label), Some(emotion));
        }
        assert_eq!(Emotion::from_label("bored"), None);
    }
}
