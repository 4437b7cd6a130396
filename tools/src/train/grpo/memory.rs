//! What a run needs of memory, computed from shapes alone.

use super::settings::GrpoArgs;

/// Prints the plan.
pub fn print(_args: &GrpoArgs, _max_new_tokens: usize) -> anyhow::Result<()> {
    Ok(())
}
