//! A judge made of word lists. It never trains anything: no reward, no loss and no choice of a model is made with it,
//! so that a gain which it confirms is not one in pleasing the verifier. Keep it so.
//!
//! It counts the words and phrases that name each emotion, leaves out those that are denied ("not happy", "no sign of
//! fear or anger"), and gives the emotion named most often; of equals, the one named last. Where none is named it gives
//! neutral. A finer emotion that is no label of the model counts for the nearest that is: anxiety for fear, helplessness
//! and disappointment for sadness, contempt for disgust or else anger.

use std::collections::HashMap;

use candor::verify::Emotion;

/// Words that deny what follows in their clause.
const DENYING: &[&str] = &[
    "not", "no", "never", "without", "neither", "nor", "none", "nothing", "hardly", "barely", "scarcely", "lack",
    "lacks", "lacking", "lacked", "absence", "absent", "cannot", "cant", "isnt", "arent", "wasnt", "werent", "doesnt",
    "dont", "didnt", "wont", "wouldnt", "couldnt", "hasnt", "havent",
];

/// Phrases that deny what follows in their clause.
const DENYING_PHRASES: &[&str] =
    &["rather than", "instead of", "free of", "free from", "far from", "devoid of", "anything but", "as opposed to"];

/// Phrases with a denying word that deny nothing that follows.
const AFFIRMING: &[&str] = &[
    "nothing but",
    "not only",
    "not just",
    "not merely",
    "no doubt",
    "without doubt",
    "without a doubt",
    "without question",
    "none other than",
    "no other than",
    "nothing less than",
    "nothing short of",
    "cannot help",
    "cannot help but",
    "not to mention",
    "i wonder",
    "at a loss for words",
    "at a loss",
];

/// Words that begin another clause, where no denial reaches.
const BORDERS: &[&str] =
    &["but", "yet", "although", "though", "while", "whereas", "because", "since", "so", "and", "however", "which"];

/// So many words behind it a denial still reaches.
const REACH: usize = 6;

/// What stands before a word that names an emotion only as a predicate: "is down", not "pulled down".
const LINKING: &[&str] = &[
    "am",
    "is",
    "are",
    "was",
    "were",
    "be",
    "been",
    "being",
    "seem",
    "seems",
    "seemed",
    "appear",
    "appears",
    "appeared",
    "look",
    "looks",
    "looked",
    "feel",
    "feels",
    "felt",
    "feeling",
    "sound",
    "sounds",
    "become",
    "becomes",
    "became",
    "remain",
    "remains",
    "stay",
    "stays",
    "as",
    "of",
    "call",
    "called",
    "this",
    "someone",
    "somebody",
    "him",
    "her",
    "them",
    "person",
    "show",
    "shows",
    "showing",
    "suggest",
    "suggests",
    "convey",
    "conveys",
    "express",
    "expresses",
    "indicate",
    "indicates",
    "reflect",
    "reflects",
    "betray",
    "betrays",
    "reads",
    "read",
];

/// Words that may stand between the two.
const BETWEEN: &[&str] = &[
    "a", "an", "the", "very", "rather", "quite", "so", "too", "most", "likely", "visibly", "clearly", "really",
    "truly", "slightly", "little", "bit", "somewhat", "more", "utterly", "deeply", "perhaps", "probably", "still",
];

/// Words and phrases by emotion. A star stands for any ending; a tilde marks words that count as a predicate only.
const WORDS: &[(Emotion, &str)] = &[
    (
        Emotion::Happiness,
        "happ(y|ier|iest|ily|iness), joy*, delight*, pleasure*, pleased, pleasing, cheer, cheers, cheerf*, cheeri*, \
         cheery, good cheer, glad*, elat*, bliss*, glee*, overjoyed, merr(y|ier|ily|iment), enjoy*, content, contented, \
         contentment, jubila*, gaiety, mirth*, euphori*, high spirits, good spirits, rapture*, rejoic*, exult*, \
         exhilarat*, ecsta*, amuse*, satisf*, pure fun, having fun, fun, laugh*, good mood, good humour, smil*, grin, \
         grins, grinning, beam, ~beaming, beaming with, jolly, jolliness, felicity, well being, thrill*, upbeat, ~sunny, \
         ~radiant, over the moon, cloud nine, light hearted*, lighthearted*, something good, playful*, excite*, \
         hopeful*, optimis*, gratitude, grateful*, thankful*, love, loving*, affection*, tender*, warmth, proud*, pride, \
         relief, relieved, triumph*, festive, carefree, chuckl*, giggl*, festivit*, jovial*, ebullien*, buoyan*, \
         gratif*, charmed, enchant*, adorati*, adoring",
    ),
    (
        Emotion::Anger,
        "anger*, angr(y|ier|iest|ily), rage, rages, raging, fury, furious*, hostil*, enrag*, mad, madder, wrath*, \
         outrag*, ire, irate*, indigna*, incens*, livid, seeth*, resent*, hatred, hate, hates, hateful*, hating, \
         aggress*, animosity, venom*, bad temper*, temper, hot temper*, spite, spiteful*, vex*, irritat*, irritab*, \
         exasperat*, enmity, feroci*, grudg*, bitter, bitterness, annoy*, fierce*, bad blood, belligeren*, displeas*, \
         fuming, fume, fumes, infuriat*, cross with, ~cross, boiling with, up in arms, foaming at the mouth, provok*, \
         ticked off, scowl*, glaring, glares, glower*, snarl*, frustrat*, hostilit*, menac*, antagoni*, aggrav*, \
         irked, pissed, riled, cranky, grumpy, vengeful*, bellicose, heated",
    ),
    (
        Emotion::Disgust,
        "disgust*, revul*, revolt*, loath*, averse, aversion*, sicken*, repell*, repuls*, repugn*, distaste*, nause*, \
         grossed out, gross, abhor*, queas*, detest*, sickness, ~sick, sick of, sick to, sick feeling, dislike*, \
         deep dislike, abominat*, squeamish*, odium, antipath*, foul, foul taste, foul smell, bad smell, bad taste, \
         smells bad, tastes bad, smells or tastes bad, stench, stink*, vomit*, throw up, appal*, put off, turned off, \
         offended by, offence at, displeased by the taste, creeped out, gag, gagging, gags, retch*, yuck*, unsavo*, \
         unpalat*, contempt and disgust, repelled, disgruntle*, turn away in, icky, filthy, vile, rotten",
    ),
    (
        Emotion::Fear,
        "fear, fears, feared, fearf*, fearing, fright*, dread*, terror*, terrif*, afraid, scare, scared, scares, scary, \
         scaring, panic*, horror*, horrif*, alarm*, petrif*, spook*, trepidat*, forebod*, timid*, consternat*, phobi*, \
         cold feet, coward*, threat*, hunted, hysteri*, the creeps, nightmar*, intimidat*, ~shaken, scared stiff, \
         aghast, trembl*, freaked out, haunted, cowering, cowers, afraid for, distress and fear, quak*, shudder*, \
         terrorised, terrorized, daunt*, danger*",
    ),
    (
        Emotion::Sadness,
        "sad, sadder, saddest, sadly, sadness, sadden*, sorrow*, unhapp*, miser(y|able|ably), downcast, melanchol*, \
         heartache*, heartbreak*, heartbroken, broken heart*, brokenhearted, broken hearted, deject*, gloom*, mourn*, \
         woe, woeful*, low spirits, anguish*, wretched*, desponden*, tear, tears, tearful*, grief, griev*, depress*, \
         lonel*, regret*, desolat*, the blues, ~blue, loss, cry, cries, cried, crying, weep, weeps, weeping, wept, \
         weepy, hurt, hurts, downhearted, crestfallen, forlorn, ~down, ~low, dispirit*, dishearten*, sob, sobs, \
         sobbing, bereave*, ~heavy hearted, sullen*, dismal, pity, remorse*, plaintive*, doleful*, pained, homesick*",
    ),
    (
        Emotion::Surprise,
        "surpris*, astonish*, amaz*, shock*, startl*, disbelief, disbelieving*, unexpected*, bewilder*, wonder, \
         wonderment, stunn*, taken aback, dumbfound*, astound*, incredul*, sudden start, unaware, unawares, stupef*, \
         bolt from the blue, out of the blue, unforeseen, flabbergast*, speechless*, off guard, thunderstruck, jolt, \
         jolts, jolted, stagger*, dazed, blown away, ~floored, awestruck, awe, unprepared, agape with, agape in, dumbstruck, \
         gobsmack*, wide eyed, nonpluss*, did not expect, didnt expect, not expect*, never expect*, expected nothing, \
         out of their wits, perplex*, baffle*, gasp*, open mouthed, marvel*, confound*, stupor, caught by",
    ),
    (
        Emotion::Neutral,
        "neutral*, calm*, compos(ed|ure), unmoved, indifferen*, no strong feeling*, no strong emotion*, no emotion*, \
         no particular emotion*, no particular feeling*, no clear emotion*, no feeling*, not emotional, even temper*, \
         everyday state, impassiv*, matter of fact, expressionless, unaffected, equanim*, nothing in particular, \
         ~quiet, quietness, steadiness, ~steady, resting state, ordinary mood, ~ordinary, absence of feeling, \
         absence of emotion, lack of emotion, routine, level mood, tranquil*, plain state, ~plain, ~plain and, \
         blank look, ~blank, blank expression, stillness, usual mood, normal mood, average day, detachment, detached, \
         seren*, relaxed, relaxation, ~even, ~collected, uninvolved, undisturbed, emotionless*, unemotional*, \
         level headed*, at rest, deadpan, placid*, unconcern*, neither happy nor sad, neither sad nor happy, \
         unexcited, stoic*, poker faced, poker face, nothing seems to move, nothing moves, flat affect, dispassionate*, \
         apathetic, apathy, nonchalan*, unperturbed, unruffled, peaceful*, without emotion, without any emotion, \
         without feeling, no sign of emotion, no signs of emotion",
    ),
    (
        Emotion::Anxiety,
        "anxi*, nervous*, worr(y|ied|ies|ying|isome), apprehens*, uneas*, jitter*, on edge, tense, tensely, tension, \
         stress*, restless*, fret*, agitat*, troubled, insecur*, panicky, distressed, concerned, disquiet*, jumpy, \
         edgy, dread of",
    ),
    (
        Emotion::Helplessness,
        "helpless*, powerless*, hopeless*, despair*, desperat*, defeated, overwhelm*, resign(ed|ation), lost and, \
         vulnerab*, defenceless*, defenseless*, at their wits end, surrender*, impoten*, no way out, trapped, \
         giving up, gives up, given up, stranded, cornered, weakness, futil*, paralys*, paralyz*, incapab*",
    ),
    (
        Emotion::Disappointment,
        "disappoint*, let down, lets down, letting down, letdown, disillusion*, dissatisf*, dismay*, disenchant*, \
         discourag*, unfulfilled, chagrin*, frustrated hope*, dashed hope*, hopes dashed, underwhelm*, unsatisf*, \
         unimpressed, anticlima*, fell short, falls short, expected more, hoped for more, deflated, disaffected, \
         failed to live up",
    ),
    (
        Emotion::Contempt,
        "contempt*, disdain*, scorn*, sneer*, smirk*, derisi*, deride*, mock*, ridicul*, condescen*, haught*, arrogan*, \
         superiority, dismissive*, despis*, snobb*, snort*, smug*, cynic*, sarcas*, disrespect*, look down on, looks down on, looking down on, belittl*, patroni*, snide, \
         supercilious",
    ),
];

/// What a finer emotion counts for where it is no label.
const NEAREST: &[(Emotion, &[Emotion])] = &[
    (Emotion::Anxiety, &[Emotion::Fear]),
    (Emotion::Helplessness, &[Emotion::Sadness]),
    (Emotion::Disappointment, &[Emotion::Sadness]),
    (Emotion::Contempt, &[Emotion::Disgust, Emotion::Anger]),
];

/// A word of a phrase.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Pattern {
    Whole(String),
    Beginning(String),
}

impl Pattern {
    fn matches(&self, word: &str) -> bool {
        match self {
            Pattern::Whole(whole) => word == whole,
            Pattern::Beginning(beginning) => word.starts_with(beginning.as_str()),
        }
    }
}

/// What a phrase means where it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Meaning {
    /// It names an emotion; only as a predicate where that is set.
    Names { emotion: Emotion, predicate: bool },
    /// It denies what follows.
    Denies,
    /// Nothing: it keeps its words from being read as something else.
    Nothing,
}

#[derive(Clone, Debug)]
struct Entry {
    words: Vec<Pattern>,
    meaning: Meaning,
}

/// A word of a text, or where a clause ends.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Word(String),
    Comma,
    End,
}

/// The word lists, ready to read.
#[derive(Clone, Debug)]
pub struct Lexicon {
    /// Entries by the first letter of their first word.
    entries: HashMap<char, Vec<Entry>>,
}

impl Default for Lexicon {
    fn default() -> Self {
        Lexicon::new()
    }
}

impl Lexicon {
    /// Prepares the lists.
    pub fn new() -> Lexicon {
        let mut lexicon = Lexicon { entries: HashMap::new() };
        for (emotion, list) in WORDS {
            for term in list.split(", ").map(str::trim) {
                let (term, predicate) = term.strip_prefix('~').map_or((term, false), |term| (term, true));
                for term in alternatives(term) {
                    lexicon.add(&term, Meaning::Names { emotion: *emotion, predicate });
                }
            }
        }
        DENYING.iter().chain(DENYING_PHRASES).for_each(|phrase| lexicon.add(phrase, Meaning::Denies));
        AFFIRMING.iter().for_each(|phrase| lexicon.add(phrase, Meaning::Nothing));
        lexicon
    }

    fn add(&mut self, phrase: &str, meaning: Meaning) {
        let pattern = |word: &str| match word.strip_suffix('*') {
            Some(beginning) => Pattern::Beginning(beginning.to_owned()),
            None => Pattern::Whole(word.to_owned()),
        };
        let Some(first) = phrase.chars().next() else { return };
        let words = phrase.split(' ').map(pattern).collect();
        self.entries.entry(first).or_default().push(Entry { words, meaning });
    }

    /// The emotion, of those given, that a rationale names most often; neutral where it names none, or `None` where
    /// neutral is not among them.
    pub fn judge(&self, rationale: &str, emotions: &[Emotion]) -> Option<Emotion> {
        let named: Vec<Emotion> =
            self.named(rationale).into_iter().filter_map(|emotion| counted_as(emotion, emotions)).collect();
        let count = |emotion: Emotion| named.iter().filter(|&&other| other == emotion).count();
        // Of equals `max_by_key` gives the last.
        let most = named.iter().copied().max_by_key(|&emotion| count(emotion));
        most.or_else(|| emotions.iter().copied().find(|&emotion| emotion == Emotion::Neutral))
    }

    /// Every emotion that a text names, in the order in which it does, those that it denies left out.
    pub fn named(&self, text: &str) -> Vec<Emotion> {
        let tokens = tokens(text);
        let mut named = Vec::new();
        // Words since a denial, while it reaches.
        let mut denied: Option<usize> = None;
        // Whether the last thing read was a denied term, so that "or" and a comma carry the denial on.
        let mut carries = false;
        let mut place = 0;
        while place < tokens.len() {
            let Token::Word(word) = &tokens[place] else {
                let comma_in_list = tokens[place] == Token::Comma && carries && self.term_at(&tokens, place + 1);
                if !comma_in_list {
                    (denied, carries) = (None, false);
                }
                place += 1;
                continue;
            };
            if let Some((length, meaning)) = self.longest(&tokens, place) {
                match meaning {
                    Meaning::Nothing => {}
                    Meaning::Denies => (denied, carries) = (Some(0), false),
                    Meaning::Names { emotion, .. } if denied.is_none() => {
                        named.push(emotion);
                        carries = false;
                    }
                    // A list of denied terms is as long as it is.
                    Meaning::Names { .. } => (denied, carries) = (Some(0), true),
                }
                place += length;
                continue;
            }
            if BORDERS.contains(&word.as_str()) {
                denied = None;
            }
            if word != "or" {
                carries = false;
            }
            denied = denied.map(|words| words + 1).filter(|&words| words < REACH);
            place += 1;
        }
        named
    }

    fn term_at(&self, tokens: &[Token], place: usize) -> bool {
        let skipped = usize::from(tokens.get(place) == Some(&Token::Word("or".into())));
        matches!(self.longest(tokens, place + skipped), Some((_, Meaning::Names { .. })))
    }

    /// The longest phrase that begins at a word; of equally long ones, one that is spelled out goes before one with a
    /// star.
    fn longest(&self, tokens: &[Token], place: usize) -> Option<(usize, Meaning)> {
        let Some(Token::Word(first)) = tokens.get(place) else { return None };
        let entries = self.entries.get(&first.chars().next()?)?;
        let fits = |entry: &&Entry| {
            let words = tokens.iter().skip(place).take(entry.words.len());
            let same = words.len() == entry.words.len()
                && words.zip(&entry.words).all(|(token, pattern)| match token {
                    Token::Word(word) => pattern.matches(word),
                    _ => false,
                });
            same && match entry.meaning {
                Meaning::Names { predicate: true, .. } => is_predicate(tokens, place),
                _ => true,
            }
        };
        let rank = |entry: &&Entry| {
            let whole = entry.words.iter().filter(|pattern| matches!(pattern, Pattern::Whole(_))).count();
            (entry.words.len(), whole)
        };
        let best = entries.iter().filter(fits).max_by_key(rank)?;
        Some((best.words.len(), best.meaning))
    }
}

/// Spells out "happ(y|ily)".
fn alternatives(term: &str) -> Vec<String> {
    match term.split_once('(').and_then(|(stem, rest)| Some((stem, rest.strip_suffix(')')?))) {
        Some((stem, endings)) => endings.split('|').map(|ending| format!("{stem}{ending}")).collect(),
        None => vec![term.to_owned()],
    }
}

fn counted_as(named: Emotion, emotions: &[Emotion]) -> Option<Emotion> {
    let nearest = NEAREST.iter().find(|(finer, _)| *finer == named).map_or(&[][..], |(_, nearest)| nearest);
    std::iter::once(&named).chain(nearest).find(|emotion| emotions.contains(emotion)).copied()
}

/// Whether the word at a place follows a linking verb, or what a verb of showing shows.
fn is_predicate(tokens: &[Token], place: usize) -> bool {
    let before = tokens[..place].iter().rev();
    let mut words = before.skip_while(|token| matches!(token, Token::Word(word) if BETWEEN.contains(&word.as_str())));
    matches!(words.next(), Some(Token::Word(word)) if LINKING.contains(&word.as_str()))
}

/// Words in lower case without apostrophes; a hyphen parts words as a space does.
fn tokens(text: &str) -> Vec<Token> {
    let mut tokens = Vec::new();
    let mut word = String::new();
    for character in text.chars().chain([' ']) {
        match character {
            '\'' | '’' => {}
            letter if letter.is_alphanumeric() => word.extend(letter.to_lowercase()),
            other => {
                if !word.is_empty() {
                    tokens.push(Token::Word(std::mem::take(&mut word)));
                }
                match other {
                    ',' => tokens.push(Token::Comma),
                    '.' | ';' | ':' | '!' | '?' | '(' | ')' | '–' | '—' | '\n' => tokens.push(Token::End),
                    _ => {}
                }
            }
        }
    }
    tokens
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::data::rationale::{
        self, Bank, any_claim, cue_sentence, emotion_sentence, scene_sentence, unmeasured_sentence,
    };

    fn seven() -> Vec<Emotion> {
        rationale::Emotion::ALL.into_iter().map(same).collect()
    }

    fn same(emotion: rationale::Emotion) -> Emotion {
        Emotion::all().find(|e| e.go_emotion().id() == emotion.goemotions_id() as usize).unwrap()
    }

    fn read(text: &str) -> &'static str {
        Lexicon::new().judge(text, &seven()).unwrap().name()
    }

    #[test]
    fn every_term_that_rationales_and_their_readers_know_is_named() {
        let lexicon = Lexicon::new();
        let mut missed = Vec::new();
        for emotion in rationale::Emotion::ALL {
            for (term, is_noun) in rationale::emotion_terms(emotion) {
                let text = if is_noun { format!("This speaks of {term}.") } else { format!("The person is {term}.") };
                let named = lexicon.named(&text);
                let read = lexicon.judge(&text, &seven());
                if named.is_empty() || read != Some(same(emotion)) {
                    missed.push(format!("{text} {emotion:?} read as {read:?} from {named:?}"));
                }
            }
        }
        assert!(missed.is_empty(), "{missed:#?}");
    }

    #[test]
    fn every_sentence_that_names_an_emotion_is_read() {
        let lexicon = Lexicon::new();
        let mut random = ChaCha8Rng::seed_from_u64(3);
        for bank in [Bank::Train, Bank::HeldOut] {
            for emotion in rationale::Emotion::ALL {
                for _ in 0..2000 {
                    let text = emotion_sentence(&mut random, bank, emotion);
                    let named = lexicon.named(&text);
                    assert_eq!(lexicon.judge(&text, &seven()), Some(same(emotion)), "{text} {named:?}");
                    assert!(!named.is_empty(), "{text}");
                }
            }
        }
        for (sentence, emotion) in rationale::fixed_sentences() {
            assert_eq!(lexicon.judge(sentence, &seven()), Some(same(emotion)), "{sentence}");
        }
    }

    #[test]
    fn what_is_seen_of_a_face_names_nothing() {
        let lexicon = Lexicon::new();
        let mut named = std::collections::BTreeSet::new();
        let mut random = ChaCha8Rng::seed_from_u64(4);
        for _ in 0..4000 {
            for bank in [Bank::Train, Bank::HeldOut] {
                let claims = [any_claim(&mut random), any_claim(&mut random)];
                let texts = [
                    cue_sentence(&mut random, bank, &claims[..1]),
                    cue_sentence(&mut random, bank, &claims),
                    unmeasured_sentence(&mut random, bank),
                    scene_sentence(&mut random),
                ];
                named.extend(texts.into_iter().filter(|text| !lexicon.named(text).is_empty()));
            }
        }
        assert!(named.is_empty(), "{named:#?}");
    }

    #[test]
    fn whole_rationales_are_read() {
        let lexicon = Lexicon::new();
        let mut random = ChaCha8Rng::seed_from_u64(5);
        for _ in 0..500 {
            for emotion in rationale::Emotion::ALL {
                let measured = [0.9, -1.4, 0.2, 1.8, -0.7, 0.0, 2.5, -0.1, -3.0];
                let text = rationale::rationale(&mut random, Bank::Train, Some(&measured), emotion);
                assert_eq!(lexicon.judge(&text, &seven()), Some(same(emotion)), "{text}");
            }
        }
    }

    #[test]
    fn denials() {
        for (text, emotion) in [
            ("They are not happy. They are sad.", "sadness"),
            ("There is no sign of fear, anger or sadness; they look happy.", "happiness"),
            ("They don’t seem to be angry, they are afraid.", "fear"),
            ("Without fear or anger, but with surprise.", "surprise"),
            ("It is surprise rather than fear.", "surprise"),
            ("Nothing but fear could explain this.", "fear"),
            ("Not only angry, they are furious.", "anger"),
            ("Neither happy nor sad.", "neutral"),
            ("There is no strong feeling.", "neutral"),
            ("They did not expect this at all.", "surprise"),
            ("The mouth does not move, and they seem happy.", "happiness"),
            ("The brows do not rise while fear fills the eyes.", "fear"),
            ("They aren't glad or content or merry.", "neutral"),
            ("No emotion stands out.", "neutral"),
        ] {
            assert_eq!(read(text), emotion, "{text}");
        }
    }

    #[test]
    fn the_most_frequent_wins_and_of_equals_the_last() {
        assert_eq!(read("Fear. Anger. Fear."), "fear");
        assert_eq!(read("They look happy, or maybe sad."), "sadness");
        assert_eq!(read("They look sad, or maybe happy."), "happiness");
        assert_eq!(read("The corners are pulled down, in a blue shirt, even so."), "neutral");
        assert_eq!(read("They look down and out of the window. The mood is down."), "sadness");
        assert_eq!(read(""), "neutral");
        assert_eq!(read("ANGRY!!! Ünïcode… 笑顔"), "anger");
        assert_eq!(Lexicon::new().judge("The mouth is open.", &[Emotion::Anger]), None);
        assert_eq!(Lexicon::new().judge("Joy.", &[Emotion::Anger, Emotion::Neutral]), Some(Emotion::Neutral));
        assert_eq!(Lexicon::new().judge("Joy.", &[]), None);
    }

    #[test]
    fn finer_emotions_count_for_the_nearest_label() {
        let all: Vec<Emotion> = Emotion::all().collect();
        let lexicon = Lexicon::new();
        for (text, own, nearest) in [
            ("They are anxious.", Emotion::Anxiety, Emotion::Fear),
            ("They feel helpless.", Emotion::Helplessness, Emotion::Sadness),
            ("They are disappointed.", Emotion::Disappointment, Emotion::Sadness),
            ("A look of contempt.", Emotion::Contempt, Emotion::Disgust),
        ] {
            assert_eq!(lexicon.judge(text, &all), Some(own), "{text}");
            assert_eq!(lexicon.judge(text, &seven()), Some(nearest), "{text}");
        }
        assert_eq!(lexicon.judge("Contempt.", &[Emotion::Anger]), Some(Emotion::Anger));
    }

    #[test]
    fn every_emotion_has_dozens_of_terms_and_none_is_of_two() {
        let mut owners: HashMap<String, Emotion> = HashMap::new();
        for (emotion, list) in WORDS {
            let terms: Vec<String> = list.split(", ").flat_map(|term| alternatives(term.trim())).collect();
            assert!(terms.len() >= 24, "{emotion:?} has {}", terms.len());
            for term in terms {
                assert!(!term.is_empty() && term == term.to_lowercase(), "{term:?}");
                if let Some(other) = owners.insert(term.clone(), *emotion) {
                    panic!("{term:?} is of {other:?} and of {emotion:?}, or twice in one");
                }
            }
        }
    }
}
