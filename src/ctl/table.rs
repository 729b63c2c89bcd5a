//! Tables as kubectl prints them: columns of equal width, three spaces between them.

use super::output::{Colour, View};
use std::fmt::Write;

/// Between two columns.
const GAP: usize = 3;

/// A table.
#[derive(Clone, Debug, Default)]
pub struct Table {
    head: Vec<&'static str>,
    rows: Vec<Vec<Cell>>,
}

/// One cell.
#[derive(Clone, Debug, Default)]
pub struct Cell {
    text: String,
    colour: Option<Colour>,
}

impl<T: ToString> From<T> for Cell {
    fn from(text: T) -> Self {
        Cell { text: text.to_string(), colour: None }
    }
}

impl Cell {
    /// A cell in a colour.
    pub fn coloured(colour: Colour, text: impl ToString) -> Self {
        Cell { text: text.to_string(), colour: Some(colour) }
    }
}

impl Table {
    /// A table without rows.
    pub fn new(head: impl IntoIterator<Item = &'static str>) -> Self {
        Table { head: head.into_iter().collect(), rows: Vec::new() }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: impl IntoIterator<Item = Cell>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// The lines of the table, each with an indent of `indent` spaces.
    pub fn text(&self, view: View, indent: usize) -> String {
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.text.chars().count());
            cells.chain([self.head[column].chars().count()]).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.head.len()).map(width).collect();
        let mut out = String::new();
        let head: Vec<Cell> = self.head.iter().map(|h| Cell::coloured(Colour::Heading, h)).collect();
        for row in std::iter::once(&head).chain(&self.rows) {
            let mut line = " ".repeat(indent);
            for (at, cell) in row.iter().enumerate() {
                let text = if cell.text.is_empty() { "-" } else { &cell.text };
                line += &cell.colour.map_or_else(|| text.to_owned(), |colour| view.paint(colour, text));
                if at + 1 < row.len() {
                    line += &" ".repeat(widths[at] - text.chars().count().min(widths[at]) + GAP);
                }
            }
            let _ = writeln!(out, "{}", line.trim_end());
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_whatever_the_colours() {
        let mut table = Table::new(["NAME", "READY"]);
        table.row(["a-long-name".into(), Cell::coloured(Colour::Good, "2 of 2")]);
        table.row(["".into(), Cell::coloured(Colour::Bad, "0")]);
        assert_eq!(
            table.text(View::default(), 2),
            "  NAME          READY\n  a-long-name   2 of 2\n  -             0\n"
        );
        let coloured = table.text(View { wide: false, colour: true }, 0);
        assert!(coloured.contains("a-long-name   \x1b[32m2 of 2\x1b[0m\n"), "{coloured:?}");
    }
}
