//! A store in memory: the model of what a store does, and with faults everybody's fake.

use std::collections::BTreeMap;
use std::sync::Mutex;

use bytes::Bytes;

use crate::landing::Landing;
use crate::store::{Object, PAGE_MAX, Page, Reply, Store, StoreError, check_name, check_prefix};

/// Objects in memory.
#[derive(Default)]
pub struct Memory {
    objects: Mutex<BTreeMap<String, Bytes>>,
}

impl Memory {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    /// Every object, for a test to look at or to damage.
    pub fn with<T>(&self, look: impl FnOnce(&mut BTreeMap<String, Bytes>) -> T) -> T {
        look(&mut self.objects.lock().expect("nothing panics under this lock"))
    }

    fn put_now(&self, name: &str, body: Bytes) -> Result<(), StoreError> {
        check_name(name)?;
        self.with(|objects| match objects.entry(name.to_owned()) {
            std::collections::btree_map::Entry::Occupied(_) => Err(StoreError::Exists),
            std::collections::btree_map::Entry::Vacant(entry) => {
                entry.insert(body);
                Ok(())
            }
        })
    }

    fn get_now(&self, name: &str, from: u64, landing: &mut Landing<'_>) -> Result<(), StoreError> {
        check_name(name)?;
        let object = self.with(|objects| objects.get(name).cloned()).ok_or(StoreError::Absent)?;
        let (bytes, wanted) = (object.len() as u64, from + landing.len());
        if landing.is_empty() {
            return Ok(());
        }
        if wanted > bytes {
            return Err(StoreError::Short { bytes, wanted });
        }
        landing.push(&object[from as usize..wanted as usize]).map_err(StoreError::broken)
    }

    fn list_now(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Page, StoreError> {
        check_prefix(prefix)?;
        let limit = limit.clamp(1, PAGE_MAX);
        self.with(|objects| {
            let from = after.unwrap_or(prefix).to_owned();
            let mut matching = objects
                .range(from..)
                .filter(|(name, _)| after.is_none_or(|after| name.as_str() > after))
                .take_while(|(name, _)| name.starts_with(prefix));
            let object =
                |(name, body): (&String, &Bytes)| Object { name: name.clone(), bytes: body.len() as u64 };
            let objects: Vec<_> = matching.by_ref().take(limit).map(object).collect();
            let more = matching.next().is_some();
            let next = objects.last().filter(|_| more).map(|last| last.name.clone());
            Ok(Page { objects, next })
        })
    }
}

impl Store for Memory {
    fn describe(&self) -> String {
        "memory".to_owned()
    }

    fn put<'a>(&'a self, name: &'a str, body: Bytes) -> Reply<'a, ()> {
        Box::pin(async move { self.put_now(name, body) })
    }

    fn get<'a>(&'a self, name: &'a str, from: u64, landing: &'a mut Landing<'_>) -> Reply<'a, ()> {
        Box::pin(async move { self.get_now(name, from, landing) })
    }

    fn head<'a>(&'a self, name: &'a str) -> Reply<'a, u64> {
        Box::pin(async move {
            check_name(name)?;
            self.with(|objects| objects.get(name).map(|body| body.len() as u64)).ok_or(StoreError::Absent)
        })
    }

    fn list<'a>(&'a self, prefix: &'a str, after: Option<&'a str>, limit: usize) -> Reply<'a, Page> {
        Box::pin(async move { self.list_now(prefix, after, limit) })
    }

    fn delete<'a>(&'a self, name: &'a str) -> Reply<'a, ()> {
        Box::pin(async move {
            check_name(name)?;
            self.with(|objects| objects.remove(name));
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    struct Subject(Arc<Memory>);

    impl crate::contract::Subject for Subject {
        fn store(&self) -> Arc<dyn Store> {
            self.0.clone()
        }
    }

    crate::object_contract!(Some(Subject(Arc::new(Memory::new()))));
}
