//! What every [`Store`] must do, as tests that any back end can run: implement [`Subject`] and put
//! [`object_contract!`](crate::object_contract) in a test module.
//!
//! The suite needs nothing but an empty store, or an empty prefix of one. It panics where a store breaks its word.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::landing::Landing;
use crate::random::Random;
use crate::store::{Object, Store, StoreError};

/// A kind of store, for the suite.
pub trait Subject {
    /// The store, empty at first; the same one each time.
    fn store(&self) -> Arc<dyn Store>;
    /// Whether of writes at the same moment only one is taken, as every store promises. Some servers that stand in for
    /// one in tests look first and write then.
    fn decides_races(&self) -> bool {
        true
    }
}

/// Makes a test of every case for the subject that `$subject` evaluates to (it may await), a new one for each. Where it
/// is `None`, there is no such store here: the case says so and is skipped.
#[macro_export]
macro_rules! object_contract {
    ($subject:expr) => {
        $crate::object_contract!(@cases $subject,
            written_objects_read_back_equal,
            ranges_land_where_they_belong,
            past_the_end_is_short,
            what_is_there_is_never_overwritten,
            of_many_writers_one_wins,
            what_is_absent_is_absent,
            what_was_deleted_is_absent_and_can_be_written_again,
            lists_come_in_pages_and_in_order,
            a_prefix_lists_no_siblings,
            names_that_cannot_be_are_invalid,
            many_operations_at_once_each_get_their_own,
            a_dropped_operation_harms_nobody,
        );
    };
    (@cases $subject:expr, $($case:ident,)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $case() {
                match $subject {
                    Some(subject) => $crate::contract::$case(&subject).await,
                    None => eprintln!("SKIPPED {}: no such store here", stringify!($case)),
                }
            }
        )*
    };
}

/// Bytes that a seed repeats.
fn body(seed: u64, bytes: usize) -> Bytes {
    let mut random = Random::new(seed);
    let mut out = Vec::with_capacity(bytes + 8);
    while out.len() < bytes {
        out.extend(random.bits().to_le_bytes());
    }
    out.truncate(bytes);
    out.into()
}

async fn read(store: &dyn Store, name: &str, from: u64, bytes: usize) -> Result<Vec<u8>, StoreError> {
    let mut slot = vec![0xee; bytes];
    let mut landing = Landing::of(&mut slot);
    store.get(name, from, &mut landing).await?;
    assert!(landing.is_full(), "a read said that it was done, and is not");
    Ok(slot)
}

/// A write of what may be there. A server that answers before it has read a long body may cut the connection, so that
/// the answer is not heard; whoever asks again hears it.
async fn put_settled(store: &dyn Store, name: &str, body: Bytes) -> Result<(), StoreError> {
    let mut result = store.put(name, body.clone()).await;
    for _ in 0..20 {
        if !result.as_ref().is_err_and(StoreError::is_passing) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
        result = store.put(name, body.clone()).await;
    }
    result
}

async fn all(store: &dyn Store, prefix: &str, limit: usize) -> Vec<Object> {
    let mut objects = Vec::new();
    let mut after = None;
    loop {
        let page = store.list(prefix, after.as_deref(), limit).await.expect("a list");
        assert!(page.objects.len() <= limit, "{} objects in a page of {limit}", page.objects.len());
        objects.extend(page.objects);
        after = page.next;
        if after.is_none() {
            return objects;
        }
        assert!(objects.len() < 100_000, "a list without end");
    }
}

/// Objects of all kinds of lengths, the empty one and one of many pieces too.
pub async fn written_objects_read_back_equal(subject: &impl Subject) {
    let store = subject.store();
    for (at, bytes) in
        [0, 1, 4095, 4096, 65_537, 1 << 20, (9 << 20) + 11, (33 << 20) + 5].into_iter().enumerate()
    {
        let (name, body) = (format!("whole/{at}"), body(at as u64, bytes));
        store.put(&name, body.clone()).await.unwrap_or_else(|error| panic!("put of {bytes} bytes: {error}"));
        assert_eq!(store.head(&name).await, Ok(bytes as u64));
        assert!(
            read(&*store, &name, 0, bytes).await.expect("what was written") == body,
            "{bytes} bytes differ"
        );
    }
}

/// Every range, into several slots with gaps between them.
pub async fn ranges_land_where_they_belong(subject: &impl Subject) {
    let store = subject.store();
    let body = body(1, 300_000);
    store.put("ranged", body.clone()).await.expect("a put");
    for (from, bytes) in [(0, 1), (0, 300_000), (299_999, 1), (1, 70_000), (65_536, 65_536), (123_457, 99)] {
        let found = read(&*store, "ranged", from as u64, bytes).await.expect("a range");
        assert!(found == body[from..from + bytes], "{bytes} bytes from {from} differ");
    }
    let (mut one, mut two) = (vec![0; 1000], vec![0; 100_000]);
    let mut landing = Landing::new();
    landing.skip(10);
    landing.fill(&mut one);
    landing.skip(90_000);
    landing.fill(&mut two);
    store.get("ranged", 5, &mut landing).await.expect("a range");
    assert!(one == body[15..1015] && two == body[91_015..191_015]);
    assert_eq!(read(&*store, "ranged", 7, 0).await, Ok(vec![]), "no bytes are always there");
}

/// A read beyond the end of an object, or across it.
pub async fn past_the_end_is_short(subject: &impl Subject) {
    let store = subject.store();
    store.put("short", body(2, 1000)).await.expect("a put");
    store.put("none", Bytes::new()).await.expect("a put");
    for (name, from, bytes) in
        [("short", 0, 1001), ("short", 999, 2), ("short", 1000, 1), ("short", 5000, 10), ("none", 0, 1)]
    {
        let found = read(&*store, name, from, bytes).await;
        assert!(
            matches!(found, Err(StoreError::Short { .. })),
            "{bytes} bytes from {from} of {name}: {found:?}"
        );
    }
}

/// The first write of a name is the last.
pub async fn what_is_there_is_never_overwritten(subject: &impl Subject) {
    let store = subject.store();
    for bytes in [10, 9 << 20] {
        let (name, first) = (format!("once/{bytes}"), body(3, bytes));
        store.put(&name, first.clone()).await.expect("a put");
        for other in [body(4, bytes), body(5, 1), first.clone()] {
            assert_eq!(put_settled(&*store, &name, other).await, Err(StoreError::Exists), "{bytes} bytes");
        }
        assert!(read(&*store, &name, 0, bytes).await.expect("the first") == first);
    }
}

/// Writers of one name at the same moment.
pub async fn of_many_writers_one_wins(subject: &impl Subject) {
    let store = subject.store();
    for round in 0..4 {
        let name = format!("raced/{round}");
        let writers = (0..8).map(|writer| {
            let (store, name) = (store.clone(), name.clone());
            tokio::spawn(async move { store.put(&name, body(writer, 50_000)).await })
        });
        let mut winners = Vec::new();
        for (writer, task) in writers.collect::<Vec<_>>().into_iter().enumerate() {
            match task.await.expect("no panic") {
                Ok(()) => winners.push(writer as u64),
                Err(StoreError::Exists) => {}
                // A store may answer that two writes met; then the loser asks again and hears who won.
                Err(error) if error.is_passing() => {
                    let again = put_settled(&*store, &name, body(writer as u64, 50_000)).await;
                    assert_eq!(again, Err(StoreError::Exists));
                }
                Err(error) => panic!("a race is no reason for: {error}"),
            }
        }
        assert!(!winners.is_empty(), "nobody won");
        if subject.decides_races() {
            assert_eq!(winners.len(), 1, "{winners:?} won");
            let found = read(&*store, &name, 0, 50_000).await.expect("the winner's");
            assert!(found == body(winners[0], 50_000), "it is not the winner's");
        }
    }
}

/// A name that nobody wrote.
pub async fn what_is_absent_is_absent(subject: &impl Subject) {
    let store = subject.store();
    assert_eq!(read(&*store, "nobody/wrote/this", 0, 10).await, Err(StoreError::Absent));
    assert_eq!(store.head("nobody/wrote/this").await, Err(StoreError::Absent));
    assert_eq!(store.delete("nobody/wrote/this").await, Ok(()));
    assert_eq!(all(&*store, "nobody/", 10).await, []);
    assert_eq!(all(&*store, "", 10).await, []);
}

/// A deletion, twice.
pub async fn what_was_deleted_is_absent_and_can_be_written_again(subject: &impl Subject) {
    let store = subject.store();
    store.put("a/gone", body(6, 100)).await.expect("a put");
    for _ in 0..2 {
        assert_eq!(store.delete("a/gone").await, Ok(()));
        assert_eq!(read(&*store, "a/gone", 0, 100).await, Err(StoreError::Absent));
        assert_eq!(all(&*store, "a/", 10).await, []);
    }
    store.put("a/gone", body(7, 50)).await.expect("a put");
    assert!(read(&*store, "a/gone", 0, 50).await.expect("the second") == body(7, 50));
}

/// A list of more than a page, deep and shallow names mixed.
pub async fn lists_come_in_pages_and_in_order(subject: &impl Subject) {
    let store = subject.store();
    let mut wanted = BTreeSet::new();
    for number in 0..23u64 {
        let name =
            ["l/a-", "l/a.", "l/b/", "l/b/c/"][number as usize % 4].to_owned() + &format!("{number:02}");
        store.put(&name, body(number, number as usize)).await.expect("a put");
        wanted.insert(Object { name, bytes: number });
    }
    for limit in [1, 7, 23, 24, 1000] {
        let found = all(&*store, "l/", limit).await;
        assert!(found.iter().eq(wanted.iter()), "pages of {limit}: {found:?}");
    }
    let deep = wanted.iter().filter(|object| object.name.starts_with("l/b/")).count();
    assert_eq!(all(&*store, "l/b/", 5).await.len(), deep);
}

/// Names that begin alike.
pub async fn a_prefix_lists_no_siblings(subject: &impl Subject) {
    let store = subject.store();
    for name in ["p/one", "p/one-more", "p/two", "pp/one", "p.one", "q"] {
        store.put(name, body(8, 3)).await.expect("a put");
    }
    let names = |objects: Vec<Object>| objects.into_iter().map(|object| object.name).collect::<Vec<_>>();
    assert_eq!(names(all(&*store, "p/", 10).await), ["p/one", "p/one-more", "p/two"]);
    assert_eq!(
        names(all(&*store, "p/on", 10).await),
        ["p/one", "p/one-more"],
        "a part of a name is a prefix"
    );
    assert_eq!(names(all(&*store, "p", 10).await), ["p.one", "p/one", "p/one-more", "p/two", "pp/one"]);
    assert_eq!(names(all(&*store, "r/", 10).await), [""; 0]);
}

/// Names that would leave the store's place, or mean something to one back end only.
pub async fn names_that_cannot_be_are_invalid(subject: &impl Subject) {
    let store = subject.store();
    for name in ["", "/", "../a", "a/../b", "a//b", "a/", "A", "a b", ".a", "a?b", "a%2fb"] {
        let invalid = |error: Option<StoreError>| matches!(error, Some(StoreError::Invalid { .. }));
        assert!(invalid(store.put(name, body(9, 1)).await.err()), "put of `{name}`");
        assert!(invalid(read(&*store, name, 0, 1).await.err()), "get of `{name}`");
        assert!(invalid(store.head(name).await.err()), "head of `{name}`");
        assert!(invalid(store.delete(name).await.err()), "delete of `{name}`");
    }
    for prefix in ["/", "../", "a//", ".", "a b"] {
        assert!(
            matches!(store.list(prefix, None, 10).await, Err(StoreError::Invalid { .. })),
            "list of `{prefix}`"
        );
    }
}

/// Writers and readers side by side.
pub async fn many_operations_at_once_each_get_their_own(subject: &impl Subject) {
    let store = subject.store();
    let tasks: Vec<_> = (0..24u64)
        .map(|number| {
            let store = store.clone();
            tokio::spawn(async move {
                let (name, body) = (format!("many/{number}"), body(number, 40_000 + number as usize));
                store.put(&name, body.clone()).await.expect("a put");
                for from in [0, 1000, 20_000] {
                    let found = read(&*store, &name, from as u64, 20_000).await.expect("a range");
                    assert!(found == body[from..from + 20_000], "another's bytes");
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.expect("no panic");
    }
    assert_eq!(all(&*store, "many/", 1000).await.len(), 24);
}

/// Futures dropped at all kinds of moments.
pub async fn a_dropped_operation_harms_nobody(subject: &impl Subject) {
    let store = subject.store();
    let whole = body(10, 3 << 20);
    store.put("kept", whole.clone()).await.expect("a put");
    for micros in [0, 50, 300, 1000, 5000, 20_000] {
        let wait = Duration::from_micros(micros);
        let name = format!("dropped/{micros}");
        let _ = tokio::time::timeout(wait, store.put(&name, whole.clone())).await;
        let _ = tokio::time::timeout(wait, read(&*store, "kept", 0, whole.len())).await;
        let again = put_settled(&*store, &name, whole.clone()).await;
        assert!(matches!(again, Ok(()) | Err(StoreError::Exists)), "{again:?}");
        assert!(read(&*store, &name, 0, whole.len()).await.expect("a whole object") == whole);
        assert!(read(&*store, "kept", 0, whole.len()).await.expect("a whole object") == whole);
    }
    let listed = all(&*store, "", 1000).await;
    assert_eq!(listed.len(), 7, "nothing half-written is listed: {listed:?}");
}
