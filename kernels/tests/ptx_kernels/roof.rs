//! The kernels that measure a GPU.

use crate::machine::{Grid, Int, Machine, Size, arguments};

pub(crate) fn roofs(machine: &mut Machine) {
    // Several rounds of the grid, the last one not full.
    let (blocks, count) = (2, 5003);
    let threads = blocks * 256;
    let bytes = machine.random_bytes(16 * count);
    let (data, out) = (machine.bytes(&bytes), machine.output(4 * threads));
    machine.run(["roof", "read_all"], Grid([blocks, 1, 1], 256, 0), arguments![data, Size(count), out]);
    let mut sums = vec![0u32; threads];
    for (i, four) in bytes.as_chunks::<16>().0.iter().enumerate() {
        let words = four.as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes));
        sums[i % threads] = sums[i % threads].wrapping_add(words.fold(0, |all, word| all ^ word));
    }
    assert_eq!(machine.read_words(out), sums);

    let out = machine.output(4 * threads);
    machine.run(["roof", "multiply_all"], Grid([blocks, 1, 1], 256, 0), arguments![Int(5), 0.75f32, out]);
    let value = |start: usize| (0..5).fold(start as f64, |value, _| value * 0.75 + 1.0);
    let sum = |thread: usize| (0..16).map(|i| value(thread % 256 + i)).sum::<f64>();
    machine.check("multiply_all", out, &(0..threads).map(sum).collect::<Vec<_>>(), 1e-6);
}
