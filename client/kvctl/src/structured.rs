//! Messages as JSON and YAML, by reflection over the protocol's own descriptors: the names are those of
//! the proto fields and a field added there shows up here by itself.
//!
//! What differs from the protobuf JSON mapping, for the sake of `jq`: keys are hex, enum values are
//! lowercase names without their prefix (`disk`, `evicted_quota`), 64-bit integers are numbers, and fields
//! that hold their default are present. Checksums are hex text: a number would lose its low bits.

use std::sync::LazyLock;

use kv_api::v1;
use prost_reflect::{
    DescriptorPool, DynamicMessage, FieldDescriptor, Kind, MapKey, ReflectMessage as _, Value,
};
use serde_json::{Map, Value as Json};

use crate::cli::Format;

/// A message that knows its own name in the protocol.
pub(crate) trait Named: prost::Message {
    const NAME: &'static str;
}

macro_rules! named {
    ($($message:ident)*) => {
        $(impl Named for v1::$message { const NAME: &'static str = concat!("kv.v1.", stringify!($message)); })*
        #[cfg(test)]
        const NAMES: &[&str] = &[$(v1::$message::NAME),*];
    };
}

named! {
    StatusResponse ListTiersResponse ListClientsResponse ListLeasesResponse ListTenantsResponse
    ListBlocksResponse GetConfigResponse SetQuotaResponse Progress DrainResponse TierInfo ClientInfo
    TenantInfo BlockInfo ExplainResponse PinResponse UnpinResponse EvictResponse DescribeResponse Found
    ListPeersResponse DescribePeerResponse ListTransfersResponse ListObjectTiersResponse ListPacksResponse
    DescribePackResponse CollectObjectsResponse ListGpusResponse GpuInfo
}

static POOL: LazyLock<DescriptorPool> =
    LazyLock::new(|| DescriptorPool::decode(kv_api::DESCRIPTORS).expect("descriptors made by our own build"));

/// The message as JSON.
pub(crate) fn json<M: Named>(message: &M) -> Json {
    let descriptor = POOL.get_message_by_name(M::NAME).expect("a test looks every name up");
    let mut dynamic = DynamicMessage::new(descriptor);
    dynamic.transcode_from(message).expect("bytes of the same message");
    object(&dynamic)
}

/// `json` as text, when `format` is one for programs. `stream` is set for documents that follow each other.
pub(crate) fn text(format: Format, stream: bool, json: impl FnOnce() -> Json) -> Option<String> {
    match (format, stream) {
        (Format::Json, false) => Some(format!("{:#}\n", json())),
        (Format::Json, true) => Some(format!("{}\n", json())),
        (Format::Yaml, _) => {
            let yaml = serde_norway::to_string(&json()).expect("JSON is YAML");
            Some(if stream { format!("---\n{yaml}") } else { yaml })
        }
        (Format::Table | Format::Wide | Format::Name, _) => None,
    }
}

fn object(message: &DynamicMessage) -> Json {
    let mut map = Map::new();
    for field in message.descriptor().fields() {
        // Of alternatives only the one that is there; of the rest all, so that scripts find every name.
        if field.containing_oneof().is_some() && !message.has_field(&field) {
            continue;
        }
        let absent = field.supports_presence() && !message.has_field(&field);
        let shown = if absent { Json::Null } else { value(&field, &message.get_field(&field)) };
        map.insert(field.name().to_owned(), shown);
    }
    Json::Object(map)
}

fn value(field: &FieldDescriptor, found: &Value) -> Json {
    match found {
        Value::Bool(yes) => (*yes).into(),
        Value::I32(number) => (*number).into(),
        Value::I64(number) => (*number).into(),
        Value::U32(number) => (*number).into(),
        Value::U64(number) if field.name() == "checksum" => format!("{number:016x}").into(),
        Value::U64(number) => (*number).into(),
        Value::F32(number) => (*number).into(),
        Value::F64(number) => (*number).into(),
        Value::String(text) => text.as_str().into(),
        Value::Bytes(bytes) => hex(bytes).into(),
        Value::EnumNumber(number) => enum_name(field, *number),
        Value::Message(message) => object(message),
        Value::List(items) => items.iter().map(|item| value(field, item)).collect(),
        Value::Map(entries) => {
            let entry = field.kind();
            let of = entry.as_message().expect("a map field is of entries").map_entry_value_field();
            let mut pairs: Vec<(String, Json)> =
                entries.iter().map(|(key, item)| (map_key(key), value(&of, item))).collect();
            pairs.sort_by(|a, b| a.0.cmp(&b.0));
            Json::Object(pairs.into_iter().collect())
        }
    }
}

fn map_key(key: &MapKey) -> String {
    match key {
        MapKey::Bool(yes) => yes.to_string(),
        MapKey::I32(number) => number.to_string(),
        MapKey::I64(number) => number.to_string(),
        MapKey::U32(number) => number.to_string(),
        MapKey::U64(number) => number.to_string(),
        MapKey::String(text) => text.clone(),
    }
}

/// `TIER_DISK` of `Tier` is `disk`; unspecified is null; a number from a newer daemon stays a number.
fn enum_name(field: &FieldDescriptor, number: i32) -> Json {
    let Kind::Enum(descriptor) = field.kind() else { return number.into() };
    let Some(value) = descriptor.get_value(number) else { return number.into() };
    let name = value.name().to_lowercase();
    let prefix: String = descriptor.name().chars().enumerate().fold(String::new(), |mut text, (at, c)| {
        if at > 0 && c.is_uppercase() {
            text.push('_');
        }
        text.extend(c.to_lowercase());
        text
    });
    let short = name.strip_prefix(&format!("{prefix}_")).unwrap_or(&name);
    if short.ends_with("unspecified") { Json::Null } else { short.into() }
}

/// Lowercase hex.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_named_message_is_in_the_protocol() {
        for name in NAMES {
            assert!(POOL.get_message_by_name(name).is_some(), "{name}");
        }
    }

    #[test]
    fn keys_are_hex_enums_are_words_and_numbers_are_numbers() {
        let block = v1::BlockInfo {
            key: vec![0xab; 16].into(),
            tiers: vec![v1::Tier::Host.into(), v1::Tier::Disk.into()],
            bytes: 65_536,
            checksum: u64::MAX,
            expires_at: 1 << 60,
            ..Default::default()
        };
        let json = json(&block);
        assert_eq!(json["key"], "ab".repeat(16));
        assert_eq!(json["tiers"], serde_json::json!(["host", "disk"]));
        assert_eq!(json["bytes"], 65_536);
        assert_eq!(json["checksum"], "f".repeat(16));
        assert_eq!(json["expires_at"], 1u64 << 60);
        assert_eq!(json["tenant"], "", "defaults are present");
        assert_eq!(json["priority"], Json::Null, "unspecified is null");
    }

    #[test]
    fn absent_messages_are_null_and_reasons_are_words() {
        let miss = v1::Miss { reason: v1::MissReason::EvictedQuota.into(), fields: vec!["lora".into()] };
        let json = json(&v1::ExplainResponse { miss: Some(miss), ..Default::default() });
        assert_eq!(json["block"], Json::Null);
        assert_eq!(json["miss"], serde_json::json!({ "reason": "evicted_quota", "fields": ["lora"] }));
    }

    #[test]
    fn maps_come_in_order_and_streams_one_document_a_line() {
        let status = v1::StatusResponse {
            hits: [("host".to_owned(), 3), ("disk".to_owned(), 4)].into(),
            ..Default::default()
        };
        let line = text(Format::Json, true, || json(&status)).unwrap();
        assert!(line.contains(r#""hits":{"disk":4,"host":3}"#), "{line}");
        assert_eq!(line.lines().count(), 1);
        assert!(text(Format::Yaml, true, || json(&status)).unwrap().starts_with("---\nnode: ''\n"));
        assert_eq!(text(Format::Table, false, || unreachable!()), None);
    }
}
