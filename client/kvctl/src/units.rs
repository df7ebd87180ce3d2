//! Numbers for people: bytes, counts, ages, shares; and back from `64GiB` and `250ms`.

use std::time::Duration;

const BYTE_UNITS: [(&str, u64); 6] =
    [("PiB", 1 << 50), ("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

/// `1.9GiB`, `412GiB`, `0B`.
pub(crate) fn bytes(count: u64) -> String {
    let (unit, size) =
        BYTE_UNITS.into_iter().find(|(_, size)| count >= *size).unwrap_or(BYTE_UNITS[BYTE_UNITS.len() - 1]);
    if size == 1 {
        return format!("{count}B");
    }
    short(count as f64 / size as f64, unit)
}

/// `18.4GiB/s`; bytes over a time.
pub(crate) fn rate(count: u64, time: Duration) -> String {
    format!("{}/s", bytes((count as f64 / time.as_secs_f64().max(1e-9)) as u64))
}

/// One decimal below a hundred, none above.
fn short(value: f64, unit: &str) -> String {
    if value < 99.95 { format!("{value:.1}{unit}") } else { format!("{value:.0}{unit}") }
}

/// `1,204,331`.
pub(crate) fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `1 block`, `3 blocks`.
pub(crate) fn counted(number: u64, noun: &str) -> String {
    format!("{} {noun}{}", count(number), if number == 1 { "" } else { "s" })
}

/// `41s`, `5m3s`, `3d4h`: the two largest units.
pub(crate) fn seconds(total: u64) -> String {
    let parts = [(total / 86_400, "d"), (total / 3_600 % 24, "h"), (total / 60 % 60, "m"), (total % 60, "s")];
    let first = parts.iter().position(|(value, _)| *value > 0).unwrap_or(3);
    parts[first..]
        .iter()
        .take(2)
        .filter(|(value, _)| *value > 0 || total == 0)
        .map(|(value, unit)| format!("{value}{unit}"))
        .collect()
}

/// `250ms`, `1.4s`, `5m3s`.
pub(crate) fn milliseconds(total: u64) -> String {
    match total {
        0..1_000 => format!("{total}ms"),
        1_000..60_000 => short(total as f64 / 1e3, "s"),
        _ => seconds(total / 1_000),
    }
}

/// `180ns`, `1.8us`, `42.0ms`.
pub(crate) fn nanoseconds(total: u64) -> String {
    match total {
        0..1_000 => format!("{total}ns"),
        1_000..1_000_000 => short(total as f64 / 1e3, "us"),
        1_000_000..1_000_000_000 => short(total as f64 / 1e6, "ms"),
        _ => milliseconds(total / 1_000_000),
    }
}

/// `83.1%`, or `-` of nothing.
pub(crate) fn percent(part: u64, whole: u64) -> String {
    if whole == 0 { "-".into() } else { format!("{:.1}%", part as f64 * 100.0 / whole as f64) }
}

/// Splits `64GiB` into a number and what follows it.
fn split(text: &str) -> Option<(f64, &str)> {
    let text = text.trim();
    let end = text.find(|c: char| !(c.is_ascii_digit() || c == '.' || c == '_')).unwrap_or(text.len());
    let number = text[..end].replace('_', "").parse().ok()?;
    Some((number, text[end..].trim()))
}

/// Bytes from `65536`, `64KiB`, `1.5GiB`, `2GB`.
pub(crate) fn parse_bytes(text: &str) -> Result<u64, String> {
    const DECIMAL: [(&str, u64); 5] = [
        ("PB", 1_000_000_000_000_000),
        ("TB", 1_000_000_000_000),
        ("GB", 1_000_000_000),
        ("MB", 1_000_000),
        ("KB", 1_000),
    ];
    let wrong = || format!("`{text}` is not a size; write it like 64KiB, 1.5GiB or 65536");
    let (number, unit) = split(text).ok_or_else(wrong)?;
    let mut units = BYTE_UNITS.into_iter().chain(DECIMAL);
    let size = match unit {
        "" => 1,
        unit => units.find(|(name, _)| name.eq_ignore_ascii_case(unit)).ok_or_else(wrong)?.1,
    };
    let total = number * size as f64;
    // 2^53 bytes are 8 PiB; beyond that a float would no longer be exact.
    if total.fract() == 0.0 && total <= (1u64 << 53) as f64 { Ok(total as u64) } else { Err(wrong()) }
}

/// A duration from `250ms`, `10s`, `1.5h`, `7d`; a bare number means seconds.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is not a duration; write it like 250ms, 10s, 5m, 2h or 7d");
    let (number, unit) = split(text).ok_or_else(wrong)?;
    let size = match unit {
        "us" => 1e-6,
        "ms" => 1e-3,
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3_600.0,
        "d" => 86_400.0,
        _ => return Err(wrong()),
    };
    let time = Duration::try_from_secs_f64(number * size).map_err(|_| wrong())?;
    if time > DURATION_MAX {
        return Err(format!("`{text}` is too long; at most 3650d"));
    }
    Ok(time)
}

/// Clocks and the protocol's own durations end somewhere beyond this.
const DURATION_MAX: Duration = Duration::from_secs(3_650 * 86_400);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short_and_read_back() {
        for (number, text) in [
            (0, "0B"),
            (1023, "1023B"),
            (1024, "1.0KiB"),
            (2_040_109_466, "1.9GiB"),
            (412 << 30, "412GiB"),
            (1 << 50, "1.0PiB"),
        ] {
            assert_eq!(bytes(number), text);
        }
        assert_eq!(parse_bytes("64KiB"), Ok(65_536));
        assert_eq!(parse_bytes("1.5 gib"), Ok(1_610_612_736));
        assert_eq!(parse_bytes("2GB"), Ok(2_000_000_000));
        assert_eq!(parse_bytes("65_536"), Ok(65_536));
        for wrong in ["", "GiB", "-1", "1.5", "1e400", "9999PiB", "64Kib2", "0.3B"] {
            assert!(parse_bytes(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn times_are_short_and_read_back() {
        for (number, text) in [(0, "0s"), (41, "41s"), (303, "5m3s"), (3_600, "1h"), (273_600, "3d4h")] {
            assert_eq!(seconds(number), text);
        }
        assert_eq!(milliseconds(250), "250ms");
        assert_eq!(milliseconds(1_400), "1.4s");
        assert_eq!(nanoseconds(1_840), "1.8us");
        assert_eq!(parse_duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(parse_duration("7d"), Ok(Duration::from_secs(604_800)));
        assert_eq!(parse_duration("3650d"), Ok(DURATION_MAX));
        assert_eq!(parse_duration("2"), Ok(Duration::from_secs(2)));
        for wrong in ["", "s", "1w", "-1s", "9e99d", "99999999999999999999d", "3651d", "99999999999h"] {
            assert!(parse_duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn counts_and_shares() {
        assert_eq!(count(1_204_331), "1,204,331");
        assert_eq!(count(999), "999");
        assert_eq!(counted(1, "block"), "1 block");
        assert_eq!(percent(831, 1000), "83.1%");
        assert_eq!(percent(0, 0), "-");
    }
}
