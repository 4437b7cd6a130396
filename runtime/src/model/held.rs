//! What each position of a key-value cache holds, so that a prompt need not be read again as far as it is the same.

use candor_kernels::Device;

use super::decoder::Piece;

/// What one position was read from.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    Token(u32),
    /// A row of [`super::Rows`], which changes its stamp whenever it is filled anew.
    Row {
        stamp: u64,
        row: usize,
    },
}

/// Sources of the positions in a cache, in their order.
pub(super) struct Held(Vec<Source>);

impl Held {
    pub(super) fn with_capacity(positions: usize) -> Self {
        Held(Vec::with_capacity(positions))
    }

    /// Bytes that it takes.
    pub(super) fn bytes(&self) -> usize {
        self.0.capacity() * size_of::<Source>()
    }

    /// Forgets the positions from `position` on.
    pub(super) fn truncate(&mut self, position: usize) {
        self.0.truncate(position);
    }

    pub(super) fn push_tokens(&mut self, ids: &[u32]) {
        self.0.extend(ids.iter().copied().map(Source::Token));
    }

    /// Elements `from .. from + count` of a piece.
    pub(super) fn push<D: Device>(&mut self, piece: &Piece<'_, D>, from: usize, count: usize) {
        self.0.extend((from..from + count).map(|at| source(piece, at)));
    }

    /// Positions that a prompt begins with and that are held.
    pub(super) fn common<D: Device>(&self, pieces: &[Piece<'_, D>]) -> usize {
        let wanted = pieces.iter().flat_map(|piece| (0..piece.len()).map(move |at| source(piece, at)));
        self.0.iter().zip(wanted).take_while(|&(&held, wanted)| held == wanted).count()
    }
}

fn source<D: Device>(piece: &Piece<'_, D>, at: usize) -> Source {
    match piece {
        Piece::Tokens(ids) => Source::Token(ids[at]),
        Piece::Rows(rows) => Source::Row { stamp: rows.stamp(), row: at },
    }
}
