//! A hasty annotator, for rationales that contradict their label as those of real captions do: not at random, but where
//! a face looks like another emotion than the one it is labelled with. He knows the measured cues and what each class
//! looks like on average, and nothing else.

use super::rationale::Cue;

/// What one class's cues look like.
#[derive(Clone, Copy, Default)]
struct Class {
    count: f64,
    mean: [f64; Cue::COUNT],
}

/// The class that the annotator takes each photograph for, where he takes it for another than its own: the `share` of
/// all photographs whose cues speak for the other class most clearly. Photographs without measured cues he leaves alone.
pub fn readings(labels: &[u8], classes: usize, cues: &[Option<[f32; Cue::COUNT]>], share: f64) -> Vec<Option<usize>> {
    let measured: Vec<(usize, usize, [f64; Cue::COUNT])> = cues
        .iter()
        .enumerate()
        .filter_map(|(i, cues)| Some((i, usize::from(labels[i]), cues.as_ref()?.map(f64::from))))
        .collect();
    let mut classes = vec![Class::default(); classes];
    for (_, label, cues) in &measured {
        classes[*label].count += 1.0;
        classes[*label].mean.iter_mut().zip(cues).for_each(|(mean, cue)| *mean += cue);
    }
    for class in &mut classes {
        let count = class.count.max(1.0);
        class.mean.iter_mut().for_each(|mean| *mean /= count);
    }
    let mut spread = [0.0; Cue::COUNT];
    for (_, label, cues) in &measured {
        for ((spread, cue), mean) in spread.iter_mut().zip(cues).zip(classes[*label].mean) {
            *spread += (cue - mean) * (cue - mean) / measured.len() as f64;
        }
    }
    let distance = |class: &Class, cues: &[f64; Cue::COUNT]| -> f64 {
        let squares = cues.iter().zip(class.mean).zip(spread);
        squares.map(|((cue, mean), spread)| (cue - mean) * (cue - mean) / (2.0 * spread.max(1e-9))).sum()
    };
    // How much nearer another class is than the photograph's own.
    let mut taken: Vec<(f64, usize, usize)> = measured
        .iter()
        .filter_map(|(photograph, label, cues)| {
            let known = classes.iter().enumerate().filter(|(_, class)| class.count > 0.0);
            let (guess, nearest) =
                known.map(|(index, class)| (index, distance(class, cues))).min_by(|a, b| a.1.total_cmp(&b.1))?;
            (guess != *label).then(|| (distance(&classes[*label], cues) - nearest, *photograph, guess))
        })
        .collect();
    taken.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    taken.truncate((share * labels.len() as f64).round() as usize);
    let mut readings = vec![None; labels.len()];
    taken.into_iter().for_each(|(_, photograph, guess)| readings[photograph] = Some(guess));
    readings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn he_errs_where_a_face_looks_like_another_class() {
        // Two classes, told apart by the mouth's corners; every tenth photograph of each has those of the other.
        let cues = |i: usize| {
            let mut cues = [0.0; Cue::COUNT];
            let up = i.is_multiple_of(2) != (i % 20 < 2);
            cues[Cue::MouthCornerLift as usize] = if up { 1.0 } else { -1.0 } + (i % 7) as f32 * 0.01;
            Some(cues)
        };
        let labels: Vec<u8> = (0..200).map(|i| i % 2).collect();
        let cues: Vec<_> = (0..200).map(cues).collect();
        let taken = readings(&labels, 2, &cues, 0.5);
        for (i, reading) in taken.iter().enumerate() {
            assert_eq!(*reading, (i % 20 < 2).then(|| 1 - i % 2), "{i}");
        }
        assert_eq!(readings(&labels, 2, &cues, 0.05).iter().flatten().count(), 10);
        assert!(readings(&labels, 2, &[None; 200], 0.5).iter().all(Option::is_none));
    }
}
