//! The report as lines to read.

use std::io;

use candor::message::say;

use super::figures::{Measured, Report};

pub(super) fn print(report: &Report) -> io::Result<()> {
    say(format_args!("{} on {}, medians of {} runs", report.model, report.device, report.repeat))?;
    for stage in &report.stages {
        say(line(stage))?;
    }
    say(format_args!(
        "  memory reads at {:.1} GB/s, f32 are multiplied and added at {:.0} GFLOP/s (measured now)",
        report.read_roof_gb_s, report.compute_roof_gflop_s
    ))?;
    if let Some(peak) = report.peak_rss_mb {
        let on_gpu = match report.planned_gpu_mb {
            0.0 => String::new(),
            planned => format!(", {planned:.1} MB of the GPU's memory planned"),
        };
        let planned = format!(", {:.1} MB planned{on_gpu}", report.planned_mb);
        say(format_args!("  peak memory {peak:.1} MB resident{planned}"))?;
    }
    Ok(())
}

fn line(stage: &Measured) -> String {
    let [shortest, longest] = stage.spread_ms;
    let mut facts = Vec::new();
    match (stage.stage, stage.mb) {
        ("open", Some(mb)) => facts.push(format!("{mb:.1} MB mapped")),
        _ => {
            let behind = stage.positions.map_or(String::new(), |positions| format!(" behind {positions}"));
            let plural = if stage.count == 1 { "s" } else { "" };
            facts.push(format!("{} {}{behind}", stage.count, stage.unit));
            facts.push(format!("{} {}{plural}/s", three_digits(stage.per_s), stage.unit));
        }
    }
    if let (Some(mb), Some(speed), Some(share)) = (stage.mb, stage.gb_s, stage.read_roof_percent) {
        let each = mb / stage.count.max(1) as f64;
        facts.push(format!("{each:.2} MB a token, {speed:.2} GB/s = {share:.1} % of the read roof"));
    }
    if let (Some(speed), Some(share)) = (stage.gflop_s, stage.compute_roof_percent) {
        facts.push(format!("{speed:.1} GFLOP/s = {share:.1} % of the f32 roof"));
    }
    if let Some(rss) = stage.rss_mb {
        facts.push(format!("{rss:.0} MB resident"));
    }
    format!("  {:<10} {:>9.2} ms ({shortest:.2} to {longest:.2})   {}", stage.stage, stage.ms, facts.join(", "))
}

fn three_digits(value: f64) -> String {
    let decimals = if value >= 100.0 { 0 } else { 2 };
    format!("{value:.decimals$}")
}
