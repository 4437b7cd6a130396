//! Memory-mapped safetensors, checked before use.
