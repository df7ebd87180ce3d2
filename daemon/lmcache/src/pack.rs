//! The little MessagePack that the answers carry: `{slots: [{offset, length, shape, dtype}..], chunk_indices}`.

/// One slot, as the engine is told of it.
pub(crate) struct SlotWords<'a> {
    /// Where it begins in the pool.
    pub(crate) offset: u64,
    /// Its length in bytes.
    pub(crate) bytes: u64,
    /// Dimensions of the chunk in it.
    pub(crate) shape: &'a [u64],
    /// Element type.
    pub(crate) dtype: &'a str,
}

/// The context of a store: where chunks go, and which they are, counted from the first that was asked for.
pub(crate) fn store(slots: &[SlotWords<'_>], chunks: &[usize]) -> Vec<u8> {
    let mut out = vec![0x82];
    list(&mut out, slots);
    text(&mut out, "chunk_indices");
    array(&mut out, chunks.len());
    chunks.iter().for_each(|chunk| number(&mut out, *chunk as u64));
    out
}

/// The context of a load: where the chunks are.
pub(crate) fn retrieve(slots: &[SlotWords<'_>]) -> Vec<u8> {
    let mut out = vec![0x81];
    list(&mut out, slots);
    out
}

fn list(out: &mut Vec<u8>, slots: &[SlotWords<'_>]) {
    text(out, "slots");
    array(out, slots.len());
    for slot in slots {
        out.push(0x84);
        text(out, "offset");
        number(out, slot.offset);
        text(out, "length");
        number(out, slot.bytes);
        text(out, "shape");
        array(out, slot.shape.len());
        slot.shape.iter().for_each(|length| number(out, *length));
        text(out, "dtype");
        text(out, slot.dtype);
    }
}

fn array(out: &mut Vec<u8>, count: usize) {
    match count {
        0..=15 => out.push(0x90 | count as u8),
        16..=0xffff => {
            out.push(0xdc);
            out.extend((count as u16).to_be_bytes());
        }
        _ => {
            out.push(0xdd);
            out.extend((count as u32).to_be_bytes());
        }
    }
}

fn number(out: &mut Vec<u8>, value: u64) {
    match value {
        0..=0x7f => out.push(value as u8),
        _ => {
            out.push(0xcf);
            out.extend(value.to_be_bytes());
        }
    }
}

/// Texts of ours; none has more than 31 bytes.
fn text(out: &mut Vec<u8>, text: &str) {
    out.push(0xa0 | text.len() as u8);
    out.extend(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_packed_as_the_format_says() {
        let slot = SlotWords { offset: 1 << 20, bytes: 5, shape: &[2, 300], dtype: "int8" };
        let mut wanted = b"\x82\xa5slots\x91\x84\xa6offset\xcf\0\0\0\0\0\x10\0\0\xa6length\x05\xa5shape\x92\x02\xcf\0\0\0\0\0\0\x01\x2c\xa5dtype\xa4int8".to_vec();
        wanted.extend(b"\xadchunk_indices\xdc\x00\x10");
        wanted.extend(0..16);
        assert_eq!(store(&[slot], &(0..16).collect::<Vec<_>>()), wanted);
        assert_eq!(store(&[], &[]), b"\x82\xa5slots\x90\xadchunk_indices\x90");
        let mut long = Vec::new();
        array(&mut long, 70_000);
        assert_eq!(long, [0xdd, 0, 1, 0x11, 0x70]);
    }
}
