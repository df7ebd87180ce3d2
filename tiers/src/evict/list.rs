//! Doubly linked lists of slots, threaded through pages of nodes that are made when first needed.
//!
//! Slot numbers are sparse (a region of large slots uses few of its numbers), so nodes lie in pages of 256:
//! 3 KiB for each run of 256 numbers in which some slot was ever used, 12 bytes a slot when all are.

/// "No slot" in a link.
const NONE: u32 = u32::MAX;
/// "In no list" in a node.
const UNLINKED: u8 = u8::MAX;
const PAGE: usize = 256;

#[derive(Clone, Copy)]
struct Node {
    /// Towards the front (newer).
    newer: u32,
    /// Towards the back (older).
    older: u32,
    list: u8,
    mark: u8,
}

const FRESH: Node = Node { newer: NONE, older: NONE, list: UNLINKED, mark: 0 };

#[derive(Clone, Copy)]
struct Ends {
    newest: u32,
    oldest: u32,
    len: usize,
}

/// `N` lists over one space of slots; a slot is in one of them at most and carries a mark.
pub(super) struct Lists<const N: usize> {
    pages: Vec<Option<Box<[Node; PAGE]>>>,
    ends: [Ends; N],
}

impl<const N: usize> Default for Lists<N> {
    fn default() -> Self {
        Self { pages: Vec::new(), ends: [Ends { newest: NONE, oldest: NONE, len: 0 }; N] }
    }
}

impl<const N: usize> Lists<N> {
    /// Slots in `list`.
    pub(super) fn len(&self, list: usize) -> usize {
        self.ends[list].len
    }

    /// Slots in all lists.
    pub(super) fn len_total(&self) -> usize {
        self.ends.iter().map(|ends| ends.len).sum()
    }

    /// The slot that is longest in `list`.
    pub(super) fn oldest(&self, list: usize) -> Option<u32> {
        some(self.ends[list].oldest)
    }

    /// The neighbour of a linked slot that came after it.
    pub(super) fn newer(&self, slot: u32) -> Option<u32> {
        self.linked(slot).and_then(|node| some(node.newer))
    }

    /// The list a slot is in.
    pub(super) fn list_of(&self, slot: u32) -> Option<usize> {
        self.linked(slot).map(|node| usize::from(node.list))
    }

    /// The mark of a linked slot.
    pub(super) fn mark(&mut self, slot: u32) -> Option<&mut u8> {
        let page = self.pages.get_mut(slot as usize / PAGE)?.as_mut()?;
        let node = &mut page[slot as usize % PAGE];
        (node.list != UNLINKED).then_some(&mut node.mark)
    }

    /// Puts a slot that is in no list at the front of `list`, with mark 0.
    pub(super) fn push(&mut self, list: usize, slot: u32) {
        debug_assert!(self.list_of(slot).is_none() && slot != NONE);
        let at = slot as usize / PAGE;
        if at >= self.pages.len() {
            self.pages.resize_with(at + 1, || None);
        }
        self.pages[at].get_or_insert_with(|| Box::new([FRESH; PAGE]));
        let second = std::mem::replace(&mut self.ends[list].newest, slot);
        *self.node(slot) = Node { newer: NONE, older: second, list: list as u8, mark: 0 };
        match some(second) {
            Some(second) => self.node(second).newer = slot,
            None => self.ends[list].oldest = slot,
        }
        self.ends[list].len += 1;
    }

    /// Takes a slot out of its list; tells which that was.
    pub(super) fn unlink(&mut self, slot: u32) -> Option<usize> {
        let node = *self.linked(slot)?;
        let list = usize::from(node.list);
        match some(node.newer) {
            Some(newer) => self.node(newer).older = node.older,
            None => self.ends[list].newest = node.older,
        }
        match some(node.older) {
            Some(older) => self.node(older).newer = node.newer,
            None => self.ends[list].oldest = node.newer,
        }
        self.ends[list].len -= 1;
        *self.node(slot) = FRESH;
        Some(list)
    }

    fn linked(&self, slot: u32) -> Option<&Node> {
        let page = self.pages.get(slot as usize / PAGE)?.as_ref()?;
        Some(&page[slot as usize % PAGE]).filter(|node| node.list != UNLINKED)
    }

    /// The node of a slot whose page is there: linked slots have one.
    fn node(&mut self, slot: u32) -> &mut Node {
        let page = self.pages[slot as usize / PAGE].as_mut().expect("linked slots have a page");
        &mut page[slot as usize % PAGE]
    }
}

fn some(slot: u32) -> Option<u32> {
    (slot != NONE).then_some(slot)
}
