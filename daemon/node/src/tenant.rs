//! Tenants: who pays, how much of host memory each may hold.

use std::collections::{HashMap, VecDeque};

use kv_block::{Generation, SlotId};

/// Numbers of one tenant.
#[derive(Default, Clone)]
pub(crate) struct Tenant {
    pub(crate) name: String,
    /// `None`: no quota. 0 is one: it may hold nothing.
    pub(crate) quota_bytes: Option<u64>,
    pub(crate) host_bytes: u64,
    /// Bytes of slots that are being filled for it.
    pub(crate) coming_bytes: u64,
    pub(crate) disk_bytes: u64,
    pub(crate) host_blocks: u64,
    pub(crate) disk_blocks: u64,
    pub(crate) pinned_bytes: u64,
    pub(crate) hits: u64,
    pub(crate) misses: u64,
    /// Where its blocks in host memory stand, oldest first, and where some stood.
    pub(crate) order: VecDeque<(SlotId, Generation)>,
}

impl Tenant {
    /// Whether it could hold a block of so many bytes if it held nothing else.
    pub(crate) fn may_hold(&self, bytes: u64) -> bool {
        self.quota_bytes.is_none_or(|quota| bytes <= quota)
    }

    /// Bytes over the quota if `more` came in; 0 when it fits or there is no quota.
    pub(crate) fn excess(&self, more: u64) -> u64 {
        let held = self.host_bytes + self.coming_bytes + more;
        self.quota_bytes.map_or(0, |quota| held.saturating_sub(quota))
    }
}

/// All tenants, by dense index.
#[derive(Default)]
pub(crate) struct Tenants {
    all: Vec<Tenant>,
    by_name: HashMap<String, usize>,
}

impl Tenants {
    /// Index of the tenant, made known if it is not.
    pub(crate) fn index(&mut self, name: &str) -> usize {
        if let Some(index) = self.by_name.get(name) {
            return *index;
        }
        self.all.push(Tenant { name: name.to_owned(), ..Tenant::default() });
        self.by_name.insert(name.to_owned(), self.all.len() - 1);
        self.all.len() - 1
    }

    pub(crate) fn get_mut(&mut self, index: usize) -> Option<&mut Tenant> {
        self.all.get_mut(index)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Tenant> {
        self.all.iter()
    }
}

impl std::ops::Index<usize> for Tenants {
    type Output = Tenant;
    fn index(&self, index: usize) -> &Tenant {
        &self.all[index]
    }
}

impl std::ops::IndexMut<usize> for Tenants {
    fn index_mut(&mut self, index: usize) -> &mut Tenant {
        &mut self.all[index]
    }
}
