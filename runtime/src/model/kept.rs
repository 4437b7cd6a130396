//! Memory for what was computed of frames, so that the next window finds it: as many places as a window has frames.

use candor_kernels::{Device, DeviceError};

/// The places and what lies in them.
pub(super) struct Places<K> {
    held: Vec<Option<K>>,
    /// What is to be held.
    next: Vec<Option<K>>,
}

/// Where a window's items lie.
#[derive(Default)]
pub(super) struct Assigned {
    /// The place of each item; equal items share one.
    pub(super) place: Vec<usize>,
    /// Items that are to be computed, ascending: the first of each that lay nowhere.
    pub(super) missing: Vec<usize>,
}

impl<K: Copy + PartialEq> Places<K> {
    pub(super) fn new() -> Self {
        Places { held: Vec::new(), next: Vec::new() }
    }

    /// Gives each item a place: those that lie in one keep it, others take one that no item needs. Until
    /// [`Places::settle`] nothing is held, so that a failure on the way leaves no place with a wrong name.
    pub(super) fn assign(&mut self, items: &[K], assigned: &mut Assigned) {
        let Places { held, next } = self;
        std::mem::swap(held, next);
        held.clear();
        if next.len() != items.len() {
            // The memory may grow, and loses what is in it then.
            next.clear();
            next.resize(items.len(), None);
        }
        for place in &mut *next {
            *place = place.filter(|key| items.contains(key));
        }
        let Assigned { place, missing } = assigned;
        place.clear();
        missing.clear();
        for (index, key) in items.iter().enumerate() {
            let at = next.iter().position(|held| held.as_ref() == Some(key)).unwrap_or_else(|| {
                missing.push(index);
                // There are as many places as items, and each item takes one at most.
                let free = next.iter().position(Option::is_none).unwrap_or(0);
                next[free] = Some(*key);
                free
            });
            place.push(at);
        }
    }

    /// All items lie in their places.
    pub(super) fn settle(&mut self, items: &[K], assigned: &Assigned) {
        self.held.clear();
        self.held.resize(items.len(), None);
        for (key, &place) in items.iter().zip(&assigned.place) {
            self.held[place] = Some(*key);
        }
    }
}

/// Copies blocks of `size` elements: `blocks` are (from, to), counted in blocks.
pub(super) fn copy_blocks<D: Device>(
    device: &D,
    from: &D::Buffer,
    to: &mut D::Buffer,
    size: usize,
    blocks: impl IntoIterator<Item = (usize, usize)>,
) -> Result<(), DeviceError> {
    blocks.into_iter().try_for_each(|(source, target)| device.copy(from, source * size, to, target * size, size))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_somewhere_stays_and_the_rest_takes_free_places() {
        let (mut places, mut found) = (Places::new(), Assigned::default());
        places.assign(&[10, 11, 11, 12], &mut found);
        assert_eq!((&found.place[..], &found.missing[..]), (&[0, 1, 1, 2][..], &[0, 1, 3][..]));
        places.settle(&[10, 11, 11, 12], &found);
        places.assign(&[11, 12, 13, 14], &mut found);
        assert_eq!((&found.place[..], &found.missing[..]), (&[1, 2, 0, 3][..], &[2, 3][..]));
        places.settle(&[11, 12, 13, 14], &found);
        // A window that failed on the way leaves nothing that the next could take for its own.
        places.assign(&[11, 12, 15, 16], &mut found);
        places.assign(&[11, 12, 13, 14], &mut found);
        assert_eq!(found.missing, [0, 1, 2, 3]);
    }
}
