//! What was measured: the list, medians, the closing table and JSON.
//!
//! Invariant: a ratio is the median of the ratios of neighbouring runs, so that a machine that
//! becomes slower meanwhile does not favour the one that ran first.

use comfy_table::{CellAlignment, ContentArrangement, Table, presets::UTF8_BORDERS_ONLY};
use serde::Serialize;

/// Where a figure should lie.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Goal {
    /// The ratio should be at most this.
    RatioAtMost(f64),
    /// The ratio should be at least this.
    RatioAtLeast(f64),
    /// The value should be at most this, in the measurement's unit.
    ValueAtMost(f64),
}

/// One line of the report.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Measurement {
    /// What belongs together.
    pub group: &'static str,
    /// What was measured, with its placement.
    pub name: String,
    /// Median of the runs.
    pub value: f64,
    /// Unit of `value` and of `beside_value`.
    pub unit: &'static str,
    /// What it is compared with.
    pub beside: Option<String>,
    /// Median of that one's runs.
    pub beside_value: Option<f64>,
    /// `value / beside_value`, run by run, the median of that.
    pub ratio: Option<f64>,
    /// Where it should lie.
    pub goal: Option<Goal>,
    /// Whether it does.
    pub met: Option<bool>,
    /// How many runs the medians are of.
    pub runs: usize,
}

/// The median; 0 of nothing.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match (
        sorted.len() % 2,
        sorted.get(middle),
        sorted.get(middle.wrapping_sub(1)),
    ) {
        (0, Some(high), Some(low)) => f64::midpoint(*low, *high),
        (_, Some(value), _) => *value,
        _ => 0.0,
    }
}

impl Measurement {
    /// A figure and its peer's, each the median of its runs, in pairs.
    pub fn compared(
        group: &'static str,
        name: impl Into<String>,
        unit: &'static str,
        ours: &[f64],
        beside: impl Into<String>,
        theirs: &[f64],
        goal: Option<Goal>,
    ) -> Self {
        let pairs = ours
            .iter()
            .zip(theirs)
            .filter(|(_, theirs)| **theirs != 0.0);
        let ratios: Vec<f64> = pairs.map(|(ours, theirs)| ours / theirs).collect();
        let ratio = (!ratios.is_empty()).then(|| median(&ratios));
        let measurement = Self {
            beside: Some(beside.into()),
            beside_value: Some(median(theirs)),
            ratio,
            ..Self::alone(group, name, unit, ours, goal)
        };
        Self {
            met: measurement.is_met(),
            ..measurement
        }
    }

    /// A figure that nothing is compared with.
    pub fn alone(
        group: &'static str,
        name: impl Into<String>,
        unit: &'static str,
        ours: &[f64],
        goal: Option<Goal>,
    ) -> Self {
        let measurement = Self {
            group,
            name: name.into(),
            value: median(ours),
            unit,
            beside: None,
            beside_value: None,
            ratio: None,
            goal,
            met: None,
            runs: ours.len(),
        };
        Self {
            met: measurement.is_met(),
            ..measurement
        }
    }

    fn goal_text(&self) -> String {
        match self.goal {
            Some(Goal::RatioAtMost(limit)) => format!("ratio <= {limit}"),
            Some(Goal::RatioAtLeast(limit)) => format!("ratio >= {limit}"),
            Some(Goal::ValueAtMost(limit)) => format!("<= {limit} {}", self.unit),
            None => String::new(),
        }
    }

    fn is_met(&self) -> Option<bool> {
        match self.goal? {
            Goal::RatioAtMost(limit) => self.ratio.map(|ratio| ratio <= limit),
            Goal::RatioAtLeast(limit) => self.ratio.map(|ratio| ratio >= limit),
            Goal::ValueAtMost(limit) => Some(self.value <= limit),
        }
    }
}

/// All that one run of the benchmarks found.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// The machine, so that figures of two machines are not taken for a change of the code.
    pub machine: String,
    /// What was measured.
    pub measurements: Vec<Measurement>,
    /// What was not, and why.
    pub skipped: Vec<String>,
}

fn figure(value: f64) -> String {
    match value.abs() {
        v if v >= 1000.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

impl Report {
    /// An empty report about this machine.
    pub fn new() -> Self {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpuinfo
            .lines()
            .find_map(|line| line.strip_prefix("model name"))
            .unwrap_or("");
        let model = model.trim_start_matches(['\t', ' ', ':']);
        // Not what this process may use: it may be pinned itself.
        let cores = cpuinfo
            .lines()
            .filter(|line| line.starts_with("processor"))
            .count();
        Self {
            machine: format!("{model}, {cores} cores"),
            ..Self::default()
        }
    }

    /// The report for machines.
    pub fn to_json(&self) -> anyhow::Result<String> {
        Ok(serde_json::to_string_pretty(self)?)
    }

    /// Rows of a table in Markdown: what was measured, the value, what it stands beside, their ratio.
    pub fn to_rows(&self) -> String {
        let row = |m: &Measurement| {
            let (unit, goal) = (m.unit, m.goal_text());
            let beside = match (&m.beside, m.beside_value) {
                (Some(name), Some(value)) => format!("{name}: {} {unit}", figure(value)),
                _ => String::new(),
            };
            let ratio = m.ratio.map(|r| format!("{r:.2}")).unwrap_or_default();
            let goal = if goal.is_empty() {
                goal
            } else {
                format!(" (goal: {goal})")
            };
            let value = figure(m.value);
            format!(
                "| {} | {value} {unit} | {beside} | {ratio}{goal} |\n",
                m.name
            )
        };
        let rows: String = self.measurements.iter().map(row).collect();
        let not = |why: &String| format!("| not measured: {why} | | | |\n");
        rows + &self.skipped.iter().map(not).collect::<String>()
    }

    /// The report for people: one table.
    pub fn to_table(&self) -> String {
        let mut table = Table::new();
        table
            .load_style(UTF8_BORDERS_ONLY)
            .set_content_arrangement(ContentArrangement::Disabled);
        table.set_header([
            "", "measured", "value", "unit", "beside", "value", "ratio", "goal", "",
        ]);
        let mut group = "";
        for m in &self.measurements {
            table.add_row([
                if m.group == group {
                    String::new()
                } else {
                    m.group.to_owned()
                },
                m.name.clone(),
                figure(m.value),
                m.unit.to_owned(),
                m.beside.clone().unwrap_or_default(),
                m.beside_value.map(figure).unwrap_or_default(),
                m.ratio
                    .map(|ratio| format!("{ratio:.2}"))
                    .unwrap_or_default(),
                m.goal_text(),
                m.met
                    .map(|met| if met { "met" } else { "missed" })
                    .unwrap_or_default()
                    .to_owned(),
            ]);
            group = m.group;
        }
        for column in [2, 5, 6] {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        let skipped: String = self
            .skipped
            .iter()
            .map(|why| format!("\nnot measured: {why}"))
            .collect();
        format!("{}\n{table}{skipped}", self.machine)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median(&[]), 0.0);
        assert_eq!(median(&[3.0]), 3.0);
        assert_eq!(median(&[9.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 100.0]), 3.0);
    }

    #[test]
    fn ratios_are_taken_pair_by_pair() {
        // The machine became twice as slow after the first pair: the ratio does not notice.
        let goal = Some(Goal::RatioAtMost(1.3));
        let m = Measurement::compared(
            "g",
            "n",
            "ns",
            &[12.0, 24.0, 24.0],
            "p",
            &[10.0, 20.0, 20.0],
            goal,
        );
        assert_eq!(m.ratio, Some(1.2));
        assert_eq!(
            (m.value, m.beside_value, m.met, m.runs),
            (24.0, Some(20.0), Some(true), 3)
        );
        let m = Measurement::compared("g", "n", "ns", &[14.0], "p", &[10.0], goal);
        assert_eq!(m.met, Some(false));
        let m = Measurement::compared(
            "g",
            "n",
            "IOPS",
            &[6.0],
            "p",
            &[10.0],
            Some(Goal::RatioAtLeast(0.7)),
        );
        assert_eq!(m.met, Some(false));
        let m = Measurement::alone("g", "n", "MiB", &[17.0], Some(Goal::ValueAtMost(16.0)));
        assert_eq!((m.met, m.ratio), (Some(false), None));
        let m = Measurement::compared("g", "n", "ns", &[14.0], "p", &[0.0], goal);
        assert_eq!((m.ratio, m.met), (None, None), "no peer, no verdict");
    }

    #[test]
    fn table_and_json_hold_every_measurement() {
        let mut report = Report::new();
        report.measurements.push(Measurement::compared(
            "a",
            "x",
            "ns",
            &[12.0],
            "p",
            &[10.0],
            None,
        ));
        report
            .measurements
            .push(Measurement::alone("b", "y", "MiB", &[1234.4], None));
        report.skipped.push("z: no fio".to_owned());
        let table = report.to_table();
        for part in ["x", "1.20", "1234", "not measured: z: no fio"] {
            assert!(table.contains(part), "{part} is missing in\n{table}");
        }
        let rows = report.to_rows();
        assert_eq!(rows.lines().count(), 3, "{rows}");
        assert!(
            rows.starts_with("| x | 12.0 ns | p: 10.0 ns | 1.20 |\n"),
            "{rows}"
        );
        let json: serde_json::Value =
            serde_json::from_str(&report.to_json().expect("plain data")).expect("valid JSON");
        assert_eq!(json["measurements"][0]["ratio"], 1.2);
        assert_eq!(json["measurements"][1]["value"], 1234.4);
        assert_eq!(json["skipped"][0], "z: no fio");
    }
}
