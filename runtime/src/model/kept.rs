//! Memory for what was computed of frames, so that the next window finds it: as many places as a window has frames.

use candor_kernels::{Device, DeviceError};

/// The places and what lies in them.
pub(super) struct Places<K> {
    held: Vec<Option<K>>,
}

/// Where a window's items lie.
pub(super) struct Assigned {
    /// The place of each item; equal items share one.
    pub(super) place: Vec<usize>,
    /// Items that are to be computed, ascending: the first of each that lay nowhere.
    pub(super) missing: Vec<usize>,
}

impl<K: Copy + PartialEq> Places<K> {
    pub(super) fn new() -> Self {
        Places { held: Vec::new() }
    }

    /// Gives each item a place: those that lie in one keep it, others take one that no item needs. Until
    /// [`Places::settle`] nothing is held, so that a failure on the way leaves no place with a wrong name.
    pub(super) fn assign(&mut self, items: &[K]) -> Assigned {
        let mut held = std::mem::take(&mut self.held);
        if held.len() != items.len() {
            // The memory may grow, and loses what is in it then.
            held.clear();
            held.resize(items.len(), None);
        }
        for place in &mut held {
            *place = place.filter(|key| items.contains(key));
        }
        let mut missing = Vec::new();
        let mut place = Vec::with_capacity(items.len());
        for (index, key) in items.iter().enumerate() {
            let at = held.iter().position(|held| held.as_ref() == Some(key)).unwrap_or_else(|| {
                missing.push(index);
                // There are as many places as items, and each item takes one at most.
                let free = held.iter().position(Option::is_none).unwrap_or(0);
                held[free] = Some(*key);
                free
            });
            place.push(at);
        }
        Assigned { place, missing }
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
        let mut places = Places::new();
        let first = places.assign(&[10, 11, 11, 12]);
        assert_eq!((&first.place[..], &first.missing[..]), (&[0, 1, 1, 2][..], &[0, 1, 3][..]));
        places.settle(&[10, 11, 11, 12], &first);
        let second = places.assign(&[11, 12, 13, 14]);
        assert_eq!((&second.place[..], &second.missing[..]), (&[1, 2, 0, 3][..], &[2, 3][..]));
        places.settle(&[11, 12, 13, 14], &second);
        // A window that failed on the way leaves nothing that the next could take for its own.
        places.assign(&[11, 12, 15, 16]);
        assert_eq!(places.assign(&[11, 12, 13, 14]).missing, [0, 1, 2, 3]);
    }
}
