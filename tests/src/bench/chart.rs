//! The bench's table as a picture.
//!
//! In: a report. Out: an SVG of bars, one for each row that has a goal: how the figure lies to its goal, which is a line. Holds: names are
//! escaped; a bar that is longer than the picture is cut at its edge, and its number says how long it is.

use super::report::{Report, Row};
use std::fmt::Write;

const WIDTH: f64 = 900.0;
const LEFT: f64 = 430.0;
const LINE: f64 = 26.0;
/// Where the goals' line is: as much again fits to its right.
const GOAL: f64 = 200.0;

/// Draws it.
pub(super) fn svg(report: &Report) -> String {
    let rows: Vec<_> = report.rows.iter().filter(|row| row.goal.is_some()).collect();
    let height = LINE * (rows.len() as f64 + 2.5);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    let title = format!("{}: each figure, and its goal, which is the line", report.place);
    text(&mut out, 10.0, LINE * 0.8, &title);
    for (index, row) in rows.iter().enumerate() {
        bar(&mut out, row, LINE * (index as f64 + 1.5));
    }
    let (x, end) = (LEFT + GOAL, height - LINE * 0.5);
    let _ = writeln!(out, "<line x1=\"{x}\" y1=\"{LINE}\" x2=\"{x}\" y2=\"{end}\" stroke=\"black\"/>");
    out + "</svg>\n"
}

fn bar(out: &mut String, row: &Row, y: f64) {
    let Some(goal) = row.goal else { return };
    let value = row.ratio().unwrap_or(row.figure);
    let length = (value / goal.value() * GOAL).clamp(0.0, WIDTH - LEFT - 110.0);
    let colour = if row.met() == Some(true) { "#3a7" } else { "#c53" };
    let (top, height) = (y - LINE * 0.4, LINE * 0.7);
    let _ = writeln!(
        out,
        "<rect x=\"{LEFT}\" y=\"{top}\" width=\"{length:.1}\" height=\"{height}\" fill=\"{colour}\"/>"
    );
    let unit = if row.floor.is_some() { "×" } else { &row.unit };
    text(out, 10.0, y + 5.0, &row.what);
    text(out, LEFT + length + 5.0, y + 5.0, &format!("{value:.2} {unit} ({goal})"));
}

fn text(out: &mut String, x: f64, y: f64, text: &str) {
    let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let _ = writeln!(out, "<text x=\"{x:.1}\" y=\"{y:.1}\">{text}</text>");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_for_each_goal() {
        let rows = vec![
            Row::new("a <b>", "ms", vec![2.0]).goal(1.0),
            Row::new("no goal", "ms", vec![2.0]),
            Row::new("met", "ms", vec![2.0]).beside(&[2.0]).goal(1.3),
        ];
        let svg = svg(&Report { place: "here".to_owned(), rows });
        assert_eq!(svg.matches("<rect x=").count(), 2);
        assert!(svg.contains("a &lt;b&gt;") && !svg.contains("no goal"));
        assert_eq!((svg.matches("#c53").count(), svg.matches("#3a7").count()), (1, 1));
    }
}
