//! Checks of sizes that every device makes before it touches memory.

use crate::device::{AttentionShape, DeviceError, Result, Unfold};
use crate::pixels::{self, Picture};

/// The product of `dims`, if `actual` elements are at least as many.
pub(crate) fn at_least(op: &'static str, what: &'static str, actual: usize, dims: &[usize]) -> Result<usize> {
    match product(dims) {
        Some(expected) if expected <= actual => Ok(expected),
        expected => Err(DeviceError::Size { op, what, expected: expected.unwrap_or(usize::MAX), actual }),
    }
}

/// Fails unless `actual` elements are just the product of `dims`.
pub(crate) fn exactly(op: &'static str, what: &'static str, actual: usize, dims: &[usize]) -> Result<()> {
    match product(dims) {
        Some(expected) if expected == actual => Ok(()),
        expected => Err(DeviceError::Size { op, what, expected: expected.unwrap_or(usize::MAX), actual }),
    }
}

/// The end of `offset .. offset + len`, if it lies within `actual` elements.
pub(crate) fn range(op: &'static str, what: &'static str, actual: usize, offset: usize, len: usize) -> Result<usize> {
    match offset.checked_add(len) {
        Some(end) if end <= actual => Ok(end),
        end => Err(DeviceError::Size { op, what, expected: end.unwrap_or(usize::MAX), actual }),
    }
}

/// An argument error unless `holds`.
pub(crate) fn argument(op: &'static str, holds: bool, reason: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(DeviceError::Argument { op, reason: reason() }) }
}

/// The output size of an unfold whose kernel fits into the padded input.
pub(crate) fn unfold(unfold: &Unfold) -> Result<[usize; 3]> {
    let mut output = [0; 3];
    for (axis, positions) in output.iter_mut().enumerate() {
        let (kernel, stride) = (unfold.kernel[axis], unfold.stride[axis]);
        let padded = unfold.size[axis]
            .checked_add(unfold.pad_before[axis])
            .and_then(|size| size.checked_add(unfold.pad_after[axis]));
        *positions = match padded {
            Some(padded) if kernel > 0 && stride > 0 && kernel <= padded => (padded - kernel) / stride + 1,
            _ => {
                let reason = format!("no kernel position on axis {axis}: {unfold:?}");
                return Err(DeviceError::Argument { op: "unfold", reason });
            }
        };
    }
    Ok(output)
}

/// Patches on an axis of a picture, and the end of their columns in `actual` elements.
pub(crate) fn picture(picture: &Picture<'_>, patch: usize, actual: usize, offset: usize) -> Result<(usize, usize)> {
    picture.check()?;
    let across = pixels::patches(picture.side, patch)?;
    let end = range("picture_patches", "out", actual, offset, across * across * 3 * patch * patch)?;
    Ok((across, end))
}

fn product(dims: &[usize]) -> Option<usize> {
    dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d))
}

/// Refuses an attention without keys, whose heads do not go into each other, or that cannot be causal.
pub(crate) fn attention(op: &'static str, shape: &AttentionShape) -> Result<()> {
    let &AttentionShape { queries, keys, heads, key_heads, causal, .. } = shape;
    argument(op, keys > 0, || "there are no keys".to_owned())?;
    argument(op, key_heads > 0 && heads.is_multiple_of(key_heads), || {
        format!("{heads} heads cannot share {key_heads} key heads")
    })?;
    argument(op, !causal || queries <= keys, || format!("{queries} queries of {keys} keys cannot be causal"))
}
