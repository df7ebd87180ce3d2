//! The values people write in a configuration: sizes, times, shares, addresses, words. Each is read from one
//! text form, is printed in that form, and can say what it expects. What is printed reads back the same.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use serde::de::{Deserialize, Deserializer, Unexpected, Visitor};
use serde::ser::{Serialize, Serializer};

/// A value with a text form.
pub trait Text: Sized + fmt::Display {
    /// What is expected, to follow "expected".
    fn expected() -> String;
    /// Reads the text form.
    fn parse(text: &str) -> Option<Self>;
    /// What of a text that was not read may be repeated: all, unless somebody could have written a secret there.
    fn shown(text: &str) -> &str {
        text
    }
}

/// Serde by way of the text form. Numbers are taken as if they were written out.
macro_rules! serde_by_text {
    ($([$($generic:ident)?] $name:ty),* $(,)?) => {$(
        impl$(<$generic: Text>)? Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
        impl<'de $(, $generic: Text)?> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                deserializer.deserialize_any(TextVisitor(std::marker::PhantomData))
            }
        }
    )*};
}

struct TextVisitor<T>(std::marker::PhantomData<T>);

impl<T: Text> Visitor<'_> for TextVisitor<T> {
    type Value = T;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&T::expected())
    }
    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<T, E> {
        T::parse(text.trim()).ok_or_else(|| E::invalid_value(Unexpected::Str(T::shown(text)), &self))
    }
    fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<T, E> {
        T::parse(&number.to_string()).ok_or_else(|| E::invalid_value(Unexpected::Signed(number), &self))
    }
    fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<T, E> {
        T::parse(&number.to_string()).ok_or_else(|| E::invalid_value(Unexpected::Unsigned(number), &self))
    }
    fn visit_f64<E: serde::de::Error>(self, number: f64) -> Result<T, E> {
        T::parse(&number.to_string()).ok_or_else(|| E::invalid_value(Unexpected::Float(number), &self))
    }
}

serde_by_text!(
    [] Size,
    [] Span,
    [] Share,
    [] SizeOrShare,
    [] Address,
    [] Place,
    [] Member,
    [] StoreAt,
    [] Mode,
    [] UidRule,
    [] FilePath,
    [] Label,
    [T] OrAuto<T>,
    [T] OrOff<T>,
);

/// A number of bytes: `64GiB`, `1.5TiB`, `4096`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Size(pub u64);

const BINARY: [(&str, u64); 4] = [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
const DECIMAL: [(&str, u64); 5] =
    [("TB", 1_000_000_000_000), ("GB", 1_000_000_000), ("MB", 1_000_000), ("kB", 1000), ("KB", 1000)];

impl Size {
    /// So many KiB.
    pub const fn kib(count: u64) -> Self {
        Self(count << 10)
    }
    /// So many MiB.
    pub const fn mib(count: u64) -> Self {
        Self(count << 20)
    }
    /// So many GiB.
    pub const fn gib(count: u64) -> Self {
        Self(count << 30)
    }
    /// About this much, for people: three digits and the largest unit that fits, `1.50GiB`.
    pub fn about(self) -> String {
        match BINARY.iter().find(|(_, unit)| self.0 >= *unit) {
            None => format!("{}B", self.0),
            Some((name, unit)) if self.0.is_multiple_of(*unit) => format!("{}{name}", self.0 / unit),
            Some((name, unit)) => {
                let count = self.0 as f64 / *unit as f64;
                let digits = if count < 10.0 { 2 } else { usize::from(count < 100.0) };
                format!("{count:.digits$}{name}")
            }
        }
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match BINARY.iter().find(|(_, unit)| self.0 > 0 && self.0.is_multiple_of(*unit)) {
            Some((name, unit)) => write!(f, "{}{name}", self.0 / unit),
            None => write!(f, "{}B", self.0),
        }
    }
}

impl Text for Size {
    fn expected() -> String {
        "a size such as 512MiB, 64GiB or 1.5TiB".into()
    }
    fn parse(text: &str) -> Option<Self> {
        let units = BINARY.iter().chain(&DECIMAL).chain(&[("B", 1), ("", 1)]);
        units.filter_map(|(name, unit)| times(text.strip_suffix(name)?, *unit)).next().map(Self)
    }
}

/// `number` times `unit`, rounded down; the number may have a fraction. None when it is not a number, has
/// more than 18 digits after the point, or does not fit.
fn times(number: &str, unit: u64) -> Option<u64> {
    let number = number.trim_end();
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() || number.ends_with('.') || !digits(whole) || !digits(fraction) || fraction.len() > 18
    {
        return None;
    }
    let mut total = u128::from(whole.parse::<u64>().ok()?) * u128::from(unit);
    if !fraction.is_empty() {
        total +=
            u128::from(fraction.parse::<u64>().ok()?) * u128::from(unit) / 10u128.pow(fraction.len() as u32);
    }
    u64::try_from(total).ok()
}

/// A length of time: `250ms`, `30s`, `5m`, `2h`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Span(pub Duration);

const SPANS: [(&str, u64); 6] = [
    ("d", 86_400_000_000),
    ("h", 3_600_000_000),
    ("m", 60_000_000),
    ("s", 1_000_000),
    ("ms", 1000),
    ("us", 1),
];

impl Span {
    /// So many seconds.
    pub const fn seconds(count: u64) -> Self {
        Self(Duration::from_secs(count))
    }
    /// So many milliseconds.
    pub const fn millis(count: u64) -> Self {
        Self(Duration::from_millis(count))
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let micros = self.0.as_micros() as u64;
        match SPANS.iter().find(|(_, unit)| micros > 0 && micros.is_multiple_of(*unit)) {
            Some((name, unit)) => write!(f, "{}{name}", micros / unit),
            None => f.write_str("0s"),
        }
    }
}

impl Text for Span {
    fn expected() -> String {
        "a length of time such as 250ms, 30s, 5m or 2h".into()
    }
    fn parse(text: &str) -> Option<Self> {
        let number_ends = text.find(|letter: char| letter.is_ascii_alphabetic())?;
        let (number, name) = text.split_at(number_ends);
        let (_, unit) = SPANS.iter().find(|(known, _)| *known == name)?;
        Some(Self(Duration::from_micros(times(number, *unit)?)))
    }
}

/// A part of a whole, kept in millionths: `25%` or `0.25`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Share(u32);

impl Share {
    /// So many hundredths.
    pub const fn percent(percent: u32) -> Self {
        Self(percent * 10_000)
    }
    /// That part of `whole`, rounded down.
    pub fn of(self, whole: u64) -> u64 {
        (u128::from(whole) * u128::from(self.0) / 1_000_000) as u64
    }
    /// Whether it is nothing.
    pub fn is_zero(self) -> bool {
        self.0 == 0
    }
    /// What is left when another is taken away; `None` when there is not that much.
    pub fn without(self, other: Self) -> Option<Self> {
        self.0.checked_sub(other.0).map(Self)
    }
    /// As a number from 0 to 1.
    pub fn ratio(self) -> f64 {
        f64::from(self.0) / 1e6
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}%", f64::from(self.0) / 1e4)
    }
}

impl Text for Share {
    fn expected() -> String {
        "a share such as 25% or 0.25".into()
    }
    fn parse(text: &str) -> Option<Self> {
        let millionths = match text.strip_suffix('%') {
            Some(percent) => times(percent, 10_000)?,
            None => times(text, 1_000_000)?,
        };
        u32::try_from(millionths).ok().filter(|share| *share <= 1_000_000).map(Self)
    }
}

/// So many bytes, or a share of what the machine has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SizeOrShare {
    /// Bytes.
    Size(Size),
    /// A share of the machine's.
    Share(Share),
}

impl SizeOrShare {
    /// In bytes, where the machine has `whole`.
    pub fn of(self, whole: u64) -> u64 {
        match self {
            Self::Size(size) => size.0,
            Self::Share(share) => share.of(whole),
        }
    }
}

impl fmt::Display for SizeOrShare {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Size(size) => size.fmt(f),
            Self::Share(share) => share.fmt(f),
        }
    }
}

impl Text for SizeOrShare {
    fn expected() -> String {
        "a size such as 64GiB or a share such as 25%".into()
    }
    fn parse(text: &str) -> Option<Self> {
        match text.ends_with('%') {
            true => Share::parse(text).map(Self::Share),
            false => Size::parse(text).map(Self::Size),
        }
    }
}

/// An address and port to listen on. A port alone means this machine only; port 0 means any free one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Address(pub SocketAddr);

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Text for Address {
    fn expected() -> String {
        "an address and port such as 127.0.0.1:9472 or [::]:9472".into()
    }
    fn parse(text: &str) -> Option<Self> {
        let port = || text.parse().ok().map(|port| SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port));
        text.parse().ok().or_else(port).map(Self)
    }
}

/// Where something listens: on TCP, or on a Unix socket.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Place {
    /// An address and port; a port alone is one of this machine.
    Tcp(SocketAddr),
    /// The path of a socket, `unix:/...`.
    Unix(std::path::PathBuf),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl Text for Place {
    fn expected() -> String {
        "an address and port such as 127.0.0.1:6555, or unix: and the path of a socket".into()
    }
    fn parse(text: &str) -> Option<Self> {
        match text.strip_prefix("unix:") {
            Some(path) => FilePath::parse(path).map(|path| Self::Unix(path.0)),
            None => Address::parse(text).map(|address| Self::Tcp(address.0)),
        }
    }
}

/// An object store: a directory, `s3://bucket/prefix`, `az://account/container/prefix`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StoreAt(pub kv_object::place::Place);

impl fmt::Display for StoreAt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Text for StoreAt {
    fn expected() -> String {
        "the whole path of a directory, s3://BUCKET[/PREFIX] or az://ACCOUNT/CONTAINER[/PREFIX], with region, endpoint or path_style \
         behind a '?'; keys come from the environment"
            .into()
    }
    fn parse(text: &str) -> Option<Self> {
        let place: kv_object::place::Place = text.parse().ok()?;
        let whole = !matches!(&place, kv_object::place::Place::Dir(path) if !path.is_absolute());
        whole.then_some(Self(place))
    }
    fn shown(text: &str) -> &str {
        match text.split_once("@") {
            Some(_) => "(not shown)",
            None => text.split("?").next().unwrap_or_default(),
        }
    }
}

/// Another node, and where it serves its peers: `node-b=10.0.0.2:9473`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Member {
    /// Its name: that node's own `node.name`.
    pub name: String,
    /// A host name, or an address; one of IPv6 without its brackets.
    pub host: String,
    /// Its `peers.listen`.
    pub port: u16,
}

impl Member {
    /// Whether it is on this machine by the look of it.
    pub fn is_local(&self) -> bool {
        let loopback = |ip: IpAddr| ip.to_canonical().is_loopback();
        self.host.parse().map_or_else(|_| self.host == "localhost", loopback)
    }

    /// Whether it is listed with this address.
    pub fn is_at(&self, address: std::net::SocketAddr) -> bool {
        let same = |ip: IpAddr| ip.to_canonical() == address.ip().to_canonical();
        self.port == address.port() && self.host.parse().is_ok_and(same)
    }
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, host, port } = self;
        if host.contains(':') {
            write!(f, "{name}=[{host}]:{port}")
        } else {
            write!(f, "{name}={host}:{port}")
        }
    }
}

impl Text for Member {
    fn expected() -> String {
        "the name of a node and where it is, such as node-b=10.0.0.2:9473 or node-b=node-b.kvd:9473".into()
    }
    fn parse(text: &str) -> Option<Self> {
        let (name, place) = text.split_once('=')?;
        let (host, port) = place.rsplit_once(':')?;
        let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        let host = match bracketed {
            Some(host) => host.parse::<std::net::Ipv6Addr>().ok()?.to_string(),
            None => Label::parse(host)?.0,
        };
        let port = port.parse().ok().filter(|port| *port > 0)?;
        Some(Self { name: Label::parse(name)?.0, host, port })
    }
}

/// Permission bits of a file, in octal: `0660`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mode(pub u32);

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04o}", self.0)
    }
}

impl Text for Mode {
    fn expected() -> String {
        "permission bits in octal and quotes, such as \"0660\"".into()
    }
    fn parse(text: &str) -> Option<Self> {
        let octal = |rest: &&str| rest.len() == 3 && rest.bytes().all(|byte| (b'0'..=b'7').contains(&byte));
        text.strip_prefix('0').filter(octal).and_then(|rest| u32::from_str_radix(rest, 8).ok()).map(Self)
    }
}

/// Who: one user id, the daemon's own, or anybody.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum UidRule {
    /// The user the daemon runs as.
    Own,
    /// Anybody who can open the socket.
    Any,
    /// This user.
    Uid(u32),
}

impl fmt::Display for UidRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Own => f.write_str("self"),
            Self::Any => f.write_str("any"),
            Self::Uid(uid) => uid.fmt(f),
        }
    }
}

impl Text for UidRule {
    fn expected() -> String {
        "a user id, self or any".into()
    }
    fn parse(text: &str) -> Option<Self> {
        match text {
            "self" => Some(Self::Own),
            "any" => Some(Self::Any),
            _ => text.parse().ok().map(Self::Uid),
        }
    }
}

/// An absolute path.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FilePath(pub std::path::PathBuf);

impl fmt::Display for FilePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.display().fmt(f)
    }
}

impl Text for FilePath {
    fn expected() -> String {
        "an absolute path".into()
    }
    fn parse(text: &str) -> Option<Self> {
        (text.starts_with('/') && !text.contains('\0')).then(|| Self(text.into()))
    }
}

/// A name that is safe in a path and in a metric: letters, digits, `-`, `_` and `.`, not first, at most 63.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Label(pub String);

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Text for Label {
    fn expected() -> String {
        "a name of 1 to 63 letters, digits, '-', '_' or '.', beginning with a letter or digit".into()
    }
    fn parse(text: &str) -> Option<Self> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        let first = text.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
        (first && text.len() <= 63 && text.bytes().all(allowed)).then(|| Self(text.into()))
    }
}

/// A value, or one word in its place.
macro_rules! or_word {
    ($(#[$about:meta])* $name:ident, $variant:ident = $word:literal) => {
        $(#[$about])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum $name<T> {
            #[doc = concat!("`", $word, "`.")]
            $variant,
            /// This value.
            Set(T),
        }

        impl<T> $name<T> {
            /// The value, where one is set.
            pub fn get(&self) -> Option<&T> {
                match self {
                    Self::$variant => None,
                    Self::Set(value) => Some(value),
                }
            }
        }

        impl<T: fmt::Display> fmt::Display for $name<T> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self {
                    Self::$variant => f.write_str($word),
                    Self::Set(value) => value.fmt(f),
                }
            }
        }

        impl<T: Text> Text for $name<T> {
            fn expected() -> String {
                format!("{}, or {}", T::expected(), $word)
            }
            fn parse(text: &str) -> Option<Self> {
                match text {
                    $word => Some(Self::$variant),
                    _ => T::parse(text).map(Self::Set),
                }
            }
            fn shown(text: &str) -> &str {
                T::shown(text)
            }
        }
    };
}

or_word! {
    /// A value, or `auto`: worked out from the machine.
    OrAuto, Auto = "auto"
}
or_word! {
    /// A value, or `off`: without it.
    OrOff, Off = "off"
}

impl Text for u64 {
    fn expected() -> String {
        "a whole number".into()
    }
    fn parse(text: &str) -> Option<Self> {
        text.parse().ok()
    }
}

/// An enum whose variants are words.
macro_rules! words {
    ($(#[doc = $about:literal])* $name:ident { $($(#[doc = $doc:literal])* $variant:ident = $word:literal,)+ }) => {
        $(#[doc = $about])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum $name { $($(#[doc = $doc])* $variant,)+ }

        impl $name {
            /// Every word.
            pub const ALL: &[Self] = &[$(Self::$variant),+];
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(match self { $(Self::$variant => $word,)+ })
            }
        }

        impl Text for $name {
            fn expected() -> String {
                format!("one of {}", [$($word),+].join(", "))
            }
            fn parse(text: &str) -> Option<Self> {
                match text { $($word => Some(Self::$variant),)+ _ => None }
            }
        }

        serde_by_text!([] $name);
    };
}

words! {
    /// Whether the arena lies on huge pages.
    HugePages {
        /// Where there are some.
        Auto = "auto",
        /// Never.
        Off = "off",
        /// Or the daemon does not start.
        Required = "required",
    }
}

words! {
    /// Whether blocks move by RDMA.
    Rdma {
        /// Where both nodes have a device for it.
        Auto = "auto",
        /// Never.
        Off = "off",
        /// Or the daemon does not start.
        Required = "required",
    }
}

words! {
    /// Whether GPUs are used.
    GpuUse {
        /// Where there is a driver with a device.
        Auto = "auto",
        /// Never.
        Off = "off",
        /// Or the daemon does not start.
        Required = "required",
    }
}

words! {
    /// How pages are copied to and from a GPU.
    CopyMethod {
        /// As suits their size and the driver.
        Auto = "auto",
        /// By a kernel of ours.
        Kernel = "kernel",
        /// In one call of the driver for many pages.
        Batch = "batch",
        /// In one call for each.
        Loop = "loop",
    }
}

words! {
    /// Which block goes when room is needed.
    Policy {
        /// SIEVE: one pass of a hand over a queue; scans do not wash out what is used.
        Sieve = "sieve",
        /// S3-FIFO: a small queue on probation before the main one.
        S3Fifo = "s3fifo",
        /// Least recently used, for comparison.
        Lru = "lru",
    }
}

words! {
    /// Which kernel interface the disk tier uses.
    Engine {
        /// io_uring where the kernel allows it, else threads.
        Auto = "auto",
        /// io_uring, or the disk tier does not start.
        Uring = "uring",
        /// A few threads with ordinary reads and writes.
        Threads = "threads",
    }
}

words! {
    /// Which blocks are written to disk when they leave host memory.
    Admission {
        /// Those asked for more than once of late.
        Frequency = "frequency",
        /// Three tenths of them: those asked for most often.
        Budget = "budget",
        /// Every one.
        All = "all",
        /// None but those stored as durable.
        Never = "never",
    }
}

words! {
    /// When the disk tier makes the device's own cache durable.
    Sync {
        /// After every batch of writes, before any of them counts as stored.
        Always = "always",
        /// Never: a power cut may lose what was stored last. It is still noticed, and never served wrong.
        Never = "never",
    }
}

words! {
    /// Shape of log lines.
    LogFormat {
        /// Text on a terminal, JSON elsewhere.
        Auto = "auto",
        /// One JSON object a line.
        Json = "json",
        /// For people.
        Text = "text",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reads<T: Text + PartialEq + fmt::Debug>(rows: &[(&str, Option<T>)]) {
        for (text, wanted) in rows {
            assert_eq!(&T::parse(text), wanted, "{text}");
            if let Some(value) = wanted {
                assert_eq!(T::parse(&value.to_string()).as_ref(), Some(value), "{text} printed");
            }
        }
    }

    #[test]
    fn sizes_are_read_and_printed() {
        reads(&[
            ("0", Some(Size(0))),
            ("4096", Some(Size(4096))),
            ("64GiB", Some(Size::gib(64))),
            ("64 GiB", Some(Size::gib(64))),
            ("1.5TiB", Some(Size::gib(1536))),
            ("10GB", Some(Size(10_000_000_000))),
            ("1kB", Some(Size(1000))),
            ("7B", Some(Size(7))),
            ("16777215TiB", Some(Size(16_777_215 << 40))),
            ("16777216TiB", None),
            ("64G", None),
            ("GiB", None),
            ("-1GiB", None),
            (".5GiB", None),
            ("1.GiB", None),
            ("1e3", None),
            ("", None),
            ("99999999999999999999", None),
        ]);
        assert_eq!(Size(1_610_612_737).about(), "1.50GiB");
        assert_eq!(Size(25_769_803_777).about(), "24.0GiB");
        assert_eq!(Size(700).about(), "700B");
    }

    #[test]
    fn times_are_read_and_printed() {
        reads(&[
            ("250ms", Some(Span::millis(250))),
            ("1.5s", Some(Span::millis(1500))),
            ("5m", Some(Span::seconds(300))),
            ("1d", Some(Span::seconds(86400))),
            ("7us", Some(Span(Duration::from_micros(7)))),
            ("0s", Some(Span::seconds(0))),
            ("30", None),
            ("s", None),
            ("-1s", None),
            ("1 fortnight", None),
            ("99999999999999999d", None),
        ]);
        assert_eq!(Span::millis(1500).to_string(), "1500ms");
    }

    #[test]
    fn shares_are_read_and_printed() {
        reads(&[
            ("25%", Some(Share::percent(25))),
            ("0.25", Some(Share::percent(25))),
            ("12.5%", Some(Share(125_000))),
            ("100%", Some(Share::percent(100))),
            ("1", Some(Share::percent(100))),
            ("101%", None),
            ("25", None),
            ("-1%", None),
        ]);
        assert_eq!(Share::percent(50).of(u64::MAX), u64::MAX / 2);
    }

    #[test]
    fn the_rest_is_read_and_printed() {
        reads(&[
            ("127.0.0.1:9472", Some(Address("127.0.0.1:9472".parse().unwrap()))),
            ("0", Some(Address("127.0.0.1:0".parse().unwrap()))),
            ("[::1]:1", Some(Address("[::1]:1".parse().unwrap()))),
            ("localhost:1", None),
            ("70000", None),
        ]);
        reads(&[("0660", Some(Mode(0o660))), ("660", None), ("0668", None), ("00660", None), ("0+66", None)]);
        reads(&[("self", Some(UidRule::Own)), ("7", Some(UidRule::Uid(7))), ("-1", None), ("root", None)]);
        reads(&[("off", Some(OrOff::Off)), ("1KiB", Some(OrOff::Set(Size(1024)))), ("auto", None)]);
        reads(&[("n-1.a", Some(Label("n-1.a".into()))), ("", None), ("..", None), ("a/b", None)]);
        reads(&[("/a", Some(FilePath("/a".into()))), ("a", None), ("", None)]);
        assert_eq!(HugePages::expected(), "one of auto, off, required");
    }
}
