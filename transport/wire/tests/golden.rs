//! The frames of every version that was ever spoken, byte for byte: what stands in `fixtures/` stays readable and is
//! written again just so. Whoever changes a layout makes a new version and a new folder, and leaves the old one.
//!
//! A fixture is one frame in hex, one line of header and the rest body, under a comment that says what it is.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::path::Path;

use kv_block::{BindingTag, BlockKey, Checksum, Epoch, MissReason, Priority, Tier};
use kv_wire::frame::{HEADER_BYTES, Header, Message, WireError};
use kv_wire::message::{
    Answer, Ask, Credits, DataAnswer, DataAsk, Found, Grant, Hello, Offer, PathEnd, Probe, ReadId, Refusal,
    Refused, Sight, Taken, Want, WantId, Welcome, Window,
};

/// A message of any of the four places.
#[derive(Debug, PartialEq)]
enum Said {
    Ask(Ask),
    Answer(Answer),
    DataAsk(DataAsk),
    DataAnswer(DataAnswer),
}

impl Said {
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        match self {
            Self::Ask(message) => message.encode(&mut out),
            Self::Answer(message) => message.encode(&mut out),
            Self::DataAsk(message) => message.encode(&mut out),
            Self::DataAnswer(message) => message.encode(&mut out),
        }
        out
    }

    /// Reads what should be a message of the same place.
    fn decode(&self, frame: &[u8]) -> Result<Self, WireError> {
        Ok(match self {
            Self::Ask(_) => Self::Ask(decode(frame)?),
            Self::Answer(_) => Self::Answer(decode(frame)?),
            Self::DataAsk(_) => Self::DataAsk(decode(frame)?),
            Self::DataAnswer(_) => Self::DataAnswer(decode(frame)?),
        })
    }
}

fn decode<M: Message>(frame: &[u8]) -> Result<M, WireError> {
    let short = WireError::Length { what: "bytes missing", kind: 0 };
    let (header, body) = frame.split_first_chunk::<HEADER_BYTES>().ok_or(short)?;
    M::decode(&Header::parse(header)?, body)
}

fn key(first: u8) -> BlockKey {
    BlockKey(std::array::from_fn(|at| first + at as u8))
}

/// One of each kind, by the name of its fixture.
fn samples() -> Vec<(&'static str, Said)> {
    let want = |id, principal, wait_ms, first| Want { id: WantId(id), principal, wait_ms, key: key(first) };
    let grant = Grant {
        id: WantId(0x0102_0304_0506_0708),
        checksum: Checksum(0x1112_1314_1516_1718),
        bytes: 0x2122_2324,
        tag: BindingTag(0x3132_3334_3536_3738),
        priority: Priority::High,
        ttl_s: 0x4142_4344,
        tier: Tier::Disk,
        window: Some(Window { path: 1, address: 0x5152_5354_5556_5758, key: 0x6162_6364 }),
    };
    let of = |id, priority, tier| Grant { id: WantId(id), priority, tier, ttl_s: 0, window: None, ..grant };
    let credits = Credits { wants_max: 0x0102_0304, bytes_max: 0x1112_1314_1516_1718 };
    let refused = Refused { why: Refusal::Full, text: "64 readers are served, and no more".to_owned() };
    let misses = MissReason::ALL.iter().zip(1..).map(|(reason, id)| (WantId(id), *reason)).collect();
    let sights = Tier::ALL.into_iter().map(Sight::In).chain([Sight::Absent, Sight::Pending]).collect();
    let end = |words: &[u8]| PathEnd { path: 1, words: words.to_vec() };
    vec![
        (
            "hello",
            Said::Ask(Ask::Hello(Hello {
                versions: (1, 0x0203),
                node: "gpu-07".to_owned(),
                epoch: Epoch(0x1112_1314_1516_1718),
                principals: vec!["default".to_owned(), "Team_b.2".to_owned()],
                facts: b"{}".to_vec(),
            })),
        ),
        (
            "want",
            Said::Ask(Ask::Want(vec![
                want(0x0102_0304_0506_0708, 1, 0x2122_2324, 0x30),
                want(2, 0, 0, 0x40),
            ])),
        ),
        ("done", Said::Ask(Ask::Done(vec![WantId(0x0102_0304_0506_0708), WantId(2)]))),
        (
            "probe",
            Said::Ask(Ask::Probe(Probe {
                id: 0x0102_0304_0506_0708,
                principal: 63,
                keys: vec![key(0x30), key(0x40)],
            })),
        ),
        (
            "offer",
            Said::Ask(Ask::Offer(Offer {
                id: 0x0102_0304_0506_0708,
                principal: 1,
                binding: b"scope and slice".to_vec(),
                keys: vec![key(0x30), key(0x40)],
            })),
        ),
        ("path_of_reader", Said::Ask(Ask::Path(end(b"words of a device")))),
        ("ping", Said::Ask(Ask::Ping(0x0102_0304_0506_0708))),
        (
            "welcome",
            Said::Answer(Answer::Welcome(Welcome {
                version: 1,
                node: "gpu-08".to_owned(),
                epoch: Epoch(0x1112_1314_1516_1718),
                session: 0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10,
                credits,
                leaving: true,
                facts: vec![1, 2, 3],
            })),
        ),
        ("refused", Said::Answer(Answer::Refused(refused))),
        (
            "granted",
            Said::Answer(Answer::Granted(vec![
                grant,
                of(2, Priority::Normal, Tier::Host),
                of(3, Priority::Low, Tier::Device),
                of(4, Priority::Low, Tier::Object),
            ])),
        ),
        ("missed", Said::Answer(Answer::Missed(misses))),
        ("found", Said::Answer(Answer::Found(Found { id: 0x0102_0304_0506_0708, sights }))),
        (
            "taken",
            Said::Answer(Answer::Taken(Taken {
                id: 0x0102_0304_0506_0708,
                taken: 0x1112_1314,
                left: 0x2122_2324,
            })),
        ),
        ("path_of_owner", Said::Answer(Answer::Path(end(b"")))),
        ("pong", Said::Answer(Answer::Pong(0x0102_0304_0506_0708))),
        ("credits", Said::Answer(Answer::Credits(credits))),
        ("leaving", Said::Answer(Answer::Leaving)),
        ("staying", Said::Answer(Answer::Staying)),
        ("join", Said::DataAsk(DataAsk::Join(0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10))),
        (
            "read",
            Said::DataAsk(DataAsk::Read(vec![
                (ReadId(0x0102_0304_0506_0708), WantId(0x1112_1314_1516_1718)),
                (ReadId(2), WantId(3)),
            ])),
        ),
        ("joined", Said::DataAnswer(DataAnswer::Joined)),
        ("data", Said::DataAnswer(DataAnswer::Data(ReadId(0x0102_0304_0506_0708), 0x1112_1314))),
        ("gone", Said::DataAnswer(DataAnswer::Gone(ReadId(0x0102_0304_0506_0708)))),
        // On both connections a refusal is the same frame.
        (
            "refused_data",
            Said::DataAnswer(DataAnswer::Refused(Refused {
                why: Refusal::Session,
                text: "no such session".to_owned(),
            })),
        ),
    ]
}

fn folder() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/v1"))
}

fn fixture(name: &str) -> Vec<u8> {
    let text = std::fs::read_to_string(folder().join(format!("{name}.hex"))).unwrap_or_default();
    let digits: String = text.lines().filter(|line| !line.starts_with('#')).collect();
    let digits: Vec<_> = digits.split_whitespace().flat_map(str::chars).collect();
    let byte = |pair: &[char]| u8::from_str_radix(&pair.iter().collect::<String>(), 16).expect("hex");
    digits.chunks(2).map(byte).collect()
}

/// As a fixture has it, for whoever adds a message.
fn hex(frame: &[u8]) -> String {
    let line = |line: &[u8]| line.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ");
    frame.chunks(HEADER_BYTES).map(line).collect::<Vec<_>>().join("\n")
}

#[test]
fn the_frames_of_version_1_are_read_and_written_just_so() {
    for (name, said) in samples() {
        let frame = fixture(name);
        assert_eq!(hex(&said.encode()), hex(&frame), "{name} is written differently");
        assert_eq!(said.decode(&frame).as_ref(), Ok(&said), "{name} is read differently");
    }
}

#[test]
fn there_is_a_frame_of_every_kind_and_none_besides() {
    let listed = std::fs::read_dir(folder()).unwrap();
    let files: BTreeSet<_> = listed.map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
    let samples = samples();
    assert_eq!(files, samples.iter().map(|(name, _)| format!("{name}.hex")).collect());
    let said: BTreeSet<_> = samples.iter().map(|(_, said)| said.encode()[4]).collect();
    let kinds: BTreeSet<_> =
        (0..=u8::MAX).filter(|kind| kv_wire::kind::body_bytes_max(*kind).is_some()).collect();
    assert_eq!(said, kinds);
}

#[test]
fn every_frame_that_is_cut_or_goes_on_is_refused() {
    for (name, said) in samples() {
        let frame = said.encode();
        for end in 0..frame.len() {
            assert!(said.decode(&frame[..end]).is_err(), "{name} cut at {end}");
        }
        assert!(said.decode(&[&frame[..], &[0]].concat()).is_err(), "{name} with a byte more");
    }
}

#[test]
fn every_flipped_bit_of_a_frame_is_refused() {
    for (name, said) in samples() {
        let mut frame = said.encode();
        for bit in 0..frame.len() * 8 {
            frame[bit / 8] ^= 1 << (bit % 8);
            assert!(said.decode(&frame).is_err(), "{name}, bit {bit}");
            frame[bit / 8] ^= 1 << (bit % 8);
        }
    }
}
