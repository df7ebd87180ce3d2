//! Tables as kubectl draws them: aligned columns, no borders, one line per item.
//!
//! A kind of thing is a list of columns over its message. The same column gives the text, its alignment
//! and the order for `--sort-by`, so what is shown and what is sorted by cannot differ.

use std::cmp::Ordering;

use crate::exit::{Failure, printable};
use crate::paint::{Ink, Paint};
use crate::units;

/// One value: how it reads, how it sorts, how it is coloured.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Cell {
    text: String,
    number: Option<u64>,
    ink: Ink,
}

impl Cell {
    /// Text, sorted by alphabet. Empty text shows as `-`.
    pub(crate) fn text(text: impl AsRef<str>) -> Self {
        let text = text.as_ref();
        let text = if text.is_empty() { "-".into() } else { printable(text) };
        Self { text, number: None, ink: Ink::Plain }
    }

    /// Shown as `text`, sorted by `number`, set flush right.
    pub(crate) fn number(number: u64, text: String) -> Self {
        Self { text, number: Some(number), ink: Ink::Plain }
    }

    /// A plain count or id.
    pub(crate) fn count(number: impl Into<u64>) -> Self {
        let number = number.into();
        Self::number(number, number.to_string())
    }

    /// Bytes.
    pub(crate) fn bytes(number: impl Into<u64>) -> Self {
        let number = number.into();
        Self::number(number, units::bytes(number))
    }

    /// An age or duration in seconds.
    pub(crate) fn seconds(number: u64) -> Self {
        Self::number(number, units::seconds(number))
    }

    /// A duration in milliseconds.
    pub(crate) fn milliseconds(number: u64) -> Self {
        Self::number(number, units::milliseconds(number))
    }

    /// A unix time to come, as the time until then; 0 is never.
    pub(crate) fn until(at: u64, now: u64) -> Self {
        let text = match at {
            0 => "-".into(),
            at if at <= now => "over".into(),
            at => units::seconds(at - now),
        };
        Self::number(at, text)
    }

    /// A state word, coloured by what it means.
    pub(crate) fn state(state: &str) -> Self {
        Self { ink: ink_of(state), ..Self::text(state) }
    }

    fn order(&self, other: &Self) -> Ordering {
        match (self.number, other.number) {
            (Some(mine), Some(theirs)) => mine.cmp(&theirs),
            _ => self.text.cmp(&other.text),
        }
    }
}

/// The colour of a state word.
pub(crate) fn ink_of(state: &str) -> Ink {
    match state {
        "ok" | "present" | "up" => Ink::Good,
        "warn" | "degraded" | "pending" | "connecting" | "leaving" | "opening" | "incompatible"
        | "unread" => Ink::Warn,
        "error" | "off" | "quarantined" | "down" | "damaged" | "broken" | "lost" => Ink::Bad,
        _ => Ink::Plain,
    }
}

/// One column over items of type `T`.
pub(crate) struct Column<T> {
    /// Heading, and what `--sort-by` takes in any case.
    pub(crate) head: &'static str,
    /// Only with `-o wide`.
    pub(crate) wide: bool,
    /// The value; the second argument is the time now in unix seconds.
    pub(crate) cell: fn(&T, u64) -> Cell,
}

/// A column that is always shown.
pub(crate) const fn column<T>(head: &'static str, cell: fn(&T, u64) -> Cell) -> Column<T> {
    Column { head, wide: false, cell }
}

/// A column of `-o wide`.
pub(crate) const fn wide<T>(head: &'static str, cell: fn(&T, u64) -> Cell) -> Column<T> {
    Column { head, wide: true, cell }
}

/// Everything kvctl knows about showing one kind of thing.
pub(crate) struct Kind<T: 'static> {
    /// `tier`, `block`; with `/NAME` it is what `-o name` prints.
    pub(crate) noun: &'static str,
    pub(crate) columns: &'static [Column<T>],
    pub(crate) name: fn(&T) -> String,
}

impl<T> Kind<T> {
    /// Sorts by the column called `by`; a leading `-` turns the order round.
    pub(crate) fn sort(&self, items: &mut [T], by: &str, now: u64) -> Result<(), Failure> {
        let (name, reverse) = by.strip_prefix('-').map_or((by, false), |name| (name, true));
        let Some(column) = self.columns.iter().find(|column| column.head.eq_ignore_ascii_case(name)) else {
            let known: Vec<String> = self.columns.iter().map(|column| column.head.to_lowercase()).collect();
            return Err(Failure::usage(format!("{}s have no column `{name}`", self.noun))
                .help(format!("sort by one of {}", known.join(", "))));
        };
        items.sort_by(|a, b| {
            let order = (column.cell)(a, now).order(&(column.cell)(b, now));
            if reverse { order.reverse() } else { order }
        });
        Ok(())
    }

    /// `noun/name` lines.
    pub(crate) fn names(&self, items: &[T]) -> String {
        items.iter().map(|item| format!("{}/{}\n", self.noun, printable(&(self.name)(item)))).collect()
    }

    /// Aligned lines. `widths` carries the column widths from page to page of a long listing.
    pub(crate) fn table(&self, items: &[T], look: &Look, widths: &mut Vec<usize>) -> String {
        let columns: Vec<&Column<T>> = self.columns.iter().filter(|c| look.wide || !c.wide).collect();
        let heads = columns.iter().map(|c| Cell { ink: Ink::Head, ..Cell::text(c.head) }).collect();
        let mut rows: Vec<Vec<Cell>> =
            items.iter().map(|item| columns.iter().map(|c| (c.cell)(item, look.now)).collect()).collect();
        // A heading stands over its numbers.
        let flush_right: Vec<bool> =
            (0..columns.len()).map(|at| rows.iter().any(|row| row[at].number.is_some())).collect();
        if look.headers {
            rows.insert(0, heads);
        }
        widths.resize(columns.len(), 0);
        for row in &rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.text.chars().count());
            }
        }
        rows.iter().map(|row| line(row, widths, &flush_right, look.paint)).collect()
    }
}

/// How a listing is to look.
#[derive(Clone, Copy)]
pub(crate) struct Look {
    pub(crate) wide: bool,
    pub(crate) headers: bool,
    pub(crate) paint: Paint,
    /// Unix seconds.
    pub(crate) now: u64,
}

fn line(row: &[Cell], widths: &[usize], flush_right: &[bool], paint: Paint) -> String {
    let mut text = String::new();
    for (at, (cell, width)) in row.iter().zip(widths).enumerate() {
        let pad = " ".repeat(width - cell.text.chars().count());
        let inked = paint.ink(cell.ink, &cell.text);
        let last = at + 1 == row.len();
        match (flush_right[at], last) {
            (true, _) => text.extend([pad.as_str(), &inked]),
            (false, false) => text.extend([inked.as_str(), &pad]),
            (false, true) => text.push_str(&inked),
        }
        text.push_str(if last { "\n" } else { "   " });
    }
    text
}

/// `Name:  value` lines for `describe`; empty values show as `-`.
pub(crate) fn fields(pairs: &[(&str, String)]) -> String {
    let width = pairs.iter().map(|(name, _)| name.len()).max().unwrap_or(0) + 1;
    pairs
        .iter()
        .map(|(name, value)| {
            let value = if value.is_empty() { "-".into() } else { printable(value) };
            format!("{:width$}  {value}\n", format!("{name}:"))
        })
        .collect()
}

/// Lines under a title, an empty one before it.
pub(crate) fn section(title: &str, text: &str, paint: Paint) -> String {
    let lines: String = text.lines().map(|line| format!("  {line}\n")).collect();
    format!("\n{}\n{lines}", paint.ink(Ink::Head, title))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAIRS: Kind<(&str, u64)> = Kind {
        noun: "pair",
        columns: &[
            column("NAME", |pair, _| Cell::text(pair.0)),
            column("SIZE", |pair, _| Cell::bytes(pair.1)),
            wide("STATE", |_, _| Cell::state("ok")),
        ],
        name: |pair| pair.0.to_owned(),
    };

    fn look() -> Look {
        Look { wide: false, headers: true, paint: Paint::plain(), now: 0 }
    }

    #[test]
    fn numbers_stand_flush_right_under_their_heading() {
        let text = PAIRS.table(&[("a", 1 << 40), ("long", 5), ("", 0)], &look(), &mut Vec::new());
        assert_eq!(text, "NAME     SIZE\na      1.0TiB\nlong       5B\n-          0B\n");
    }

    #[test]
    fn wide_adds_columns_and_headers_can_go() {
        let look = Look { wide: true, headers: false, ..look() };
        assert_eq!(PAIRS.table(&[("a", 5)], &look, &mut Vec::new()), "a   5B   ok\n");
    }

    #[test]
    fn sorting_is_by_value_and_may_be_reversed() {
        let mut items = [("a", 1 << 30), ("b", 1 << 40), ("c", 5)];
        PAIRS.sort(&mut items, "-size", 0).unwrap();
        assert_eq!(items.map(|item| item.0), ["b", "a", "c"]);
        PAIRS.sort(&mut items, "NAME", 0).unwrap();
        assert_eq!(items.map(|item| item.0), ["a", "b", "c"]);
        let refused = PAIRS.sort(&mut items, "weight", 0).unwrap_err();
        assert_eq!(refused.help.as_deref(), Some("sort by one of name, size, state"));
    }

    #[test]
    fn names_can_be_given_back_to_other_commands() {
        assert_eq!(PAIRS.names(&[("a", 1), ("b\u{7}", 2)]), "pair/a\npair/b?\n");
    }

    #[test]
    fn fields_are_aligned() {
        assert_eq!(fields(&[("A", "1".into()), ("Long", String::new())]), "A:     1\nLong:  -\n");
    }
}
