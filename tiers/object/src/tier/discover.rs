//! Which packs there are: what the manifests of all nodes say, what a list of packs shows, and what the footers tell.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::collect::{self, ManifestSeen, Round};
use crate::join::join_all;
use crate::landing::Landing;
use crate::manifest::{self, Manifest, ManifestName, PackRef};
use crate::pack::{self, Footer, PackId, TRAILER_BYTES, Tail};
use crate::requests::{Kind, RequestError, attempts};
use crate::store::{Object, PAGE_MAX, Store, StoreError};

use super::{PACKS, SetAside, Tier, TierConfig, TierError, pack_name};

/// Footers that are read at once, before the next ones are asked for.
const FOOTERS_AT_ONCE: usize = 64;
/// Longest manifest or round that is read, in bytes.
const TEXT_BYTES_MAX: u64 = 64 << 20;

/// What was found when a tier was opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Opened {
    /// Nodes that have a manifest.
    pub nodes: usize,
    /// Packs that can be read.
    pub packs: usize,
    /// Blocks in them.
    pub blocks: usize,
    /// Packs that this node wrote or used in an earlier life, and goes on listing.
    pub adopted: usize,
    /// Packs of another version, or encrypted.
    pub incompatible: usize,
    /// Packs that are damaged.
    pub broken: usize,
    /// The store writes over what is there, whatever it is told: nothing will be collected.
    pub overwrites: bool,
    /// Packs whose footers could not be read now; [`Tier::refresh`] tries again.
    pub unread: usize,
}

/// The newest round of collection.
pub(super) enum Newest {
    /// There was none yet.
    None,
    /// This one.
    Known(Round),
    /// It is damaged, or of another version: nobody knows what is condemned, so nobody may delete anything.
    Unreadable(u64),
}

/// What reading a footer came to.
enum Loaded {
    Known(Footer, u32),
    Aside(SetAside),
    Gone,
    Later,
}

impl Tier {
    /// Opens the tier: finds every pack that any node wrote, at `now`, Unix time in seconds, and says that this life
    /// of the node has begun.
    pub async fn open(
        store: Arc<dyn Store>,
        config: TierConfig,
        now: u32,
    ) -> Result<(Self, Opened), TierError> {
        let tier = Self::new(store, config)?;
        // The round first: what is condemned already is not taken up.
        // Without knowing it, a node says that it honours none, and the collector waits for it.
        let round = match tier.newest_round().await? {
            Newest::Known(round) => Some(round),
            Newest::None | Newest::Unreadable(_) => None,
        };
        let manifests = tier.newest_manifests(&BTreeMap::new()).await?;
        let (node, epoch) = (&tier.config.node, tier.config.epoch);
        let own = manifests.get(node);
        let dead = round.as_ref().and_then(|round| round.dead.get(node)).copied();
        let before = own.map(|own| own.epoch).max(dead);
        if let Some(found) = before.filter(|found| epoch <= *found) {
            return Err(TierError::Fenced { epoch, found });
        }
        let listed = tier.list_packs().await?;
        let earlier: Vec<PackRef> =
            own.and_then(|own| own.manifest.as_ref()).map_or(Vec::new(), |manifest| manifest.packs.clone());
        tier.with(|state| {
            state.honoured = round.as_ref().map_or(0, |round| round.number);
            state.round_since = tier.requests.now();
            state.round = round;
            // What an earlier life listed and is still there stays listed, unless it was condemned meanwhile.
            for pack in earlier {
                let expired = pack.expires_at != 0 && pack.expires_at <= now;
                if listed.contains_key(&pack.id) && !state.is_condemned(&pack.id) && !expired {
                    state.mine.insert(pack.id, pack);
                }
            }
        });
        tier.note(&listed, &manifests);
        tier.load_unread().await;
        // What an earlier life wrote and no manifest lists: it ended before it could say so, or the manifest is lost.
        tier.with(|state| {
            let own = state.index.packs().filter(|pack| pack.writer.node == *node).map(PackRef::of);
            let own: Vec<_> = own.filter(|pack| pack.expires_at == 0 || pack.expires_at > now).collect();
            for pack in own {
                state.mine.entry(pack.id).or_insert(pack);
            }
        });
        tier.publish().await?;
        let overwrites = tier.overwrites().await?;
        tier.with(|state| state.overwrites = overwrites);
        let opened = tier.with(|state| {
            let incompatible = |(_, why): &&(u64, SetAside)| matches!(why, SetAside::Incompatible { .. });
            let incompatible = state.set_aside.values().filter(incompatible).count();
            Opened {
                nodes: manifests.len(),
                packs: state.index.len(),
                blocks: state.index.blocks(),
                adopted: state.mine.len(),
                incompatible,
                broken: state.set_aside.len() - incompatible,
                overwrites: state.overwrites,
                unread: state.unread.len(),
            }
        });
        Ok((tier, opened))
    }

    /// Learns what other nodes wrote and what is condemned, at `now`, Unix time in seconds; says what this node uses,
    /// if that changed. Costs a list, now and then two, and a read for each manifest that is new and for each pack that is
    /// not known and whose footer no manifest repeats.
    pub async fn refresh(&self, now: u32) -> Result<(), TierError> {
        self.honour(now).await?;
        let heard = self.with(|state| state.heard.clone());
        let manifests = self.newest_manifests(&heard).await?;
        let newer = manifests.get(&self.config.node).map(|own| own.epoch);
        if let Some(found) = newer.filter(|found| *found > self.config.epoch) {
            self.with(|state| state.fenced = Some(found));
            return Err(TierError::Fenced { epoch: self.config.epoch, found });
        }
        self.note(&BTreeMap::new(), &manifests);
        self.load_unread().await;
        self.publish_if_changed().await
    }

    /// Learns of packs that no manifest lists, by listing all of them.
    pub async fn rescan(&self) -> Result<(), TierError> {
        let listed = self.list_packs().await?;
        self.note(&listed, &BTreeMap::new());
        self.load_unread().await;
        Ok(())
    }

    /// Notes packs that are to be read.
    fn note(&self, listed: &BTreeMap<PackId, u64>, manifests: &BTreeMap<String, ManifestSeen>) {
        self.with(|state| {
            let found = listed.iter().map(|(id, bytes)| (*id, *bytes, None));
            let told = manifests.values().filter_map(|seen| seen.manifest.as_ref());
            let told = told
                .flat_map(|manifest| &manifest.packs)
                .map(|pack| (pack.id, pack.pack_bytes, Some(pack.footer_bytes)));
            for (id, bytes, footer) in found.chain(told) {
                let known = state.index.pack(&id).is_some() || state.set_aside.contains_key(&id);
                if known || state.is_given_up(&id) {
                    continue;
                }
                let unread = state.unread.entry(id).or_insert((bytes, None));
                unread.1 = unread.1.or(footer);
            }
            let tails = manifests.values().filter_map(|seen| seen.manifest.as_ref());
            for (id, tail) in tails.flat_map(|manifest| &manifest.tails) {
                let room = state.index.blocks() < self.config.blocks_max;
                let there = listed.is_empty() || listed.contains_key(id);
                let Some((bytes, _)) = state.unread.get(id).copied() else { continue };
                // What is not as it should be is read from the pack.
                if room
                    && there
                    && let Ok(Tail::Whole(footer)) = pack::parse_tail(id, bytes, tail)
                {
                    let footer_bytes = (bytes - footer.data_end()) as u32 - TRAILER_BYTES as u32;
                    state.unread.remove(id);
                    state.index.insert(*id, bytes, footer_bytes, &footer);
                }
            }
            for (node, seen) in manifests {
                // One that could not be read is read again next time.
                if seen.manifest.is_some() {
                    state.heard.insert(node.clone(), (seen.epoch, seen.generation));
                }
            }
        });
    }

    /// Reads the footers of all packs that are not known yet.
    async fn load_unread(&self) {
        let unread: Vec<_> =
            self.with(|state| state.unread.iter().map(|(id, unread)| (*id, *unread)).collect());
        for some in unread.chunks(FOOTERS_AT_ONCE) {
            if self.with(|state| state.index.blocks()) >= self.config.blocks_max {
                break;
            }
            let loads = some.iter().map(|(id, (bytes, footer))| self.load(id, *bytes, *footer)).collect();
            for ((id, (bytes, _)), loaded) in some.iter().zip(join_all(loads).await) {
                self.with(|state| {
                    if matches!(loaded, Loaded::Later) || state.unread.remove(id).is_none() {
                        return;
                    }
                    match loaded {
                        // It may have been condemned meanwhile.
                        Loaded::Known(footer, footer_bytes) if !state.is_given_up(id) => {
                            state.index.insert(*id, *bytes, footer_bytes, &footer);
                        }
                        Loaded::Aside(why) => {
                            state.set_aside.insert(*id, (*bytes, why));
                        }
                        Loaded::Gone => {
                            state.forget(id);
                        }
                        Loaded::Known(..) | Loaded::Later => {}
                    }
                });
            }
        }
    }

    async fn load(&self, id: &PackId, pack_bytes: u64, footer_bytes: Option<u32>) -> Loaded {
        let told = footer_bytes.map(|bytes| u64::from(bytes) + TRAILER_BYTES as u64);
        let mut tail_bytes = told.unwrap_or(self.config.tail_bytes).clamp(TRAILER_BYTES as u64, 128 << 20);
        let mut failed = None;
        // The tail; more of it if the footer is longer; either once more if what came is damaged.
        for _ in 0..4 {
            let bytes = tail_bytes.min(pack_bytes);
            let tail = match self.read_object(&pack_name(id), pack_bytes - bytes, bytes).await {
                Ok(tail) => tail,
                Err(RequestError::Store(StoreError::Absent)) => return Loaded::Gone,
                Err(RequestError::Store(StoreError::Short { .. })) => {
                    return Loaded::Aside(SetAside::Broken { why: "shorter than it should be".to_owned() });
                }
                Err(_) => return Loaded::Later,
            };
            match pack::parse_tail(id, pack_bytes, &tail) {
                Ok(Tail::Whole(footer)) => {
                    let footer_bytes = (pack_bytes - footer.data_end()) as u32 - TRAILER_BYTES as u32;
                    return Loaded::Known(footer, footer_bytes);
                }
                Ok(Tail::Incompatible { version, .. }) => {
                    return Loaded::Aside(SetAside::Incompatible { version });
                }
                Ok(Tail::More { tail_bytes: wanted }) => tail_bytes = wanted,
                Err(error) if failed == Some(error) => break,
                Err(error) => failed = Some(error),
            }
        }
        Loaded::Aside(SetAside::Broken { why: failed.map_or(String::new(), |error| error.to_string()) })
    }

    /// A part of an object, whole.
    pub(super) async fn read_object(
        &self,
        name: &str,
        from: u64,
        bytes: u64,
    ) -> Result<Vec<u8>, RequestError> {
        let mut body = vec![0; bytes as usize];
        let mut landing = Landing::of(&mut body);
        attempts!(self.requests, Kind::Get, self.upkeep_deadline(), async {
            landing.rewind();
            self.store.get(name, from, &mut landing).await?;
            if landing.is_full() { Ok(()) } else { Err(StoreError::broken("the body ended early")) }
        })?;
        self.requests.moved(Kind::Get, bytes);
        Ok(body)
    }

    /// Every object of a prefix.
    pub(super) async fn list_all(&self, prefix: &str) -> Result<Vec<Object>, RequestError> {
        let mut objects = Vec::new();
        let mut after: Option<String> = None;
        loop {
            let page = attempts!(
                self.requests,
                Kind::List,
                self.upkeep_deadline(),
                self.store.list(prefix, after.as_deref(), PAGE_MAX)
            )?;
            objects.extend(page.objects);
            after = page.next;
            if after.is_none() {
                return Ok(objects);
            }
        }
    }

    /// Every pack that is there, with its length in bytes.
    pub(super) async fn list_packs(&self) -> Result<BTreeMap<PackId, u64>, RequestError> {
        let objects = self.list_all(PACKS).await?;
        let pack = |object: &Object| Some((object.name.strip_prefix(PACKS)?.parse().ok()?, object.bytes));
        Ok(objects.iter().filter_map(pack).collect())
    }

    /// A text of ours. Read again once if it is damaged: that may have happened on the way.
    async fn read_text<T, E>(
        &self,
        object: &Object,
        parse: impl Fn(&[u8]) -> Result<T, E>,
    ) -> Result<Option<T>, RequestError> {
        if object.bytes > TEXT_BYTES_MAX {
            return Ok(None);
        }
        for _ in 0..3 {
            match self.read_object(&object.name, 0, object.bytes).await {
                Ok(bytes) => {
                    if let Ok(value) = parse(&bytes) {
                        return Ok(Some(value));
                    }
                }
                Err(RequestError::Store(StoreError::Absent | StoreError::Short { .. })) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// The newest round.
    pub(super) async fn newest_round(&self) -> Result<Newest, TierError> {
        let objects = self.list_all(collect::PREFIX).await?;
        let newest =
            objects.iter().filter_map(|object| Some((Round::number_of(&object.name)?, object))).max();
        let Some((number, object)) = newest else { return Ok(Newest::None) };
        let known = self.with(|state| state.round.clone()).filter(|round| round.number >= number);
        let round = match known {
            Some(round) => Some(round),
            None => {
                let read = self.read_text(object, Round::parse).await?;
                read.filter(|round| round.number == number)
            }
        };
        self.with(|state| state.round_unreadable = round.is_none().then_some(number));
        Ok(round.map_or(Newest::Unreadable(number), Newest::Known))
    }

    /// The newest manifest of each node. Those that `heard` has are not read again and have no content here.
    pub(super) async fn newest_manifests(
        &self,
        heard: &BTreeMap<String, (kv_block::Epoch, u64)>,
    ) -> Result<BTreeMap<String, ManifestSeen>, TierError> {
        let objects = self.list_all(manifest::PREFIX).await?;
        let mut newest: BTreeMap<String, (ManifestName, Object)> = BTreeMap::new();
        for object in objects {
            let Some(name) = ManifestName::parse(&object.name) else { continue };
            let older = newest.get(&name.node).is_some_and(|(known, _)| *known >= name);
            if !older {
                newest.insert(name.node.clone(), (name, object));
            }
        }
        let reads = newest.values().map(|(name, object)| async move {
            if heard.get(&name.node) == Some(&(name.epoch, name.generation)) {
                return Ok(None);
            }
            let manifest = self.read_text(object, Manifest::parse).await?;
            Ok::<_, RequestError>(manifest.filter(|manifest| manifest.name == *name))
        });
        let mut seen = BTreeMap::new();
        for ((node, (name, _)), manifest) in newest.iter().zip(join_all(reads.collect()).await) {
            let (epoch, generation) = (name.epoch, name.generation);
            seen.insert(node.clone(), ManifestSeen { epoch, generation, manifest: manifest? });
        }
        Ok(seen)
    }
}
