//! Stable codes of what can go wrong, each with the page that `kvctl explain` prints.
//!
//! 1xxx requests, 2xxx data, 3xxx tiers, 4xxx limits, 5xxx the daemon itself. A number is never reused.

use std::fmt;
use std::str::FromStr;

use crate::FaultKind;

macro_rules! codes {
    ($($name:ident = $number:literal, $kind:ident, $title:literal, $cause:literal, $action:literal;)*) => {
        /// A stable code, written `KVD-1001`.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
        #[repr(u16)]
        pub enum Code {
            $(#[doc = $title] $name = $number,)*
        }

        impl Code {
            /// Every code, by number.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// What a caller should make of it.
            pub fn kind(self) -> FaultKind {
                match self { $(Self::$name => FaultKind::$kind,)* }
            }

            /// What happened, in a few words.
            pub fn title(self) -> &'static str {
                match self { $(Self::$name => $title,)* }
            }

            /// How it comes about.
            pub fn cause(self) -> &'static str {
                match self { $(Self::$name => $cause,)* }
            }

            /// What to do.
            pub fn action(self) -> &'static str {
                match self { $(Self::$name => $action,)* }
            }
        }
    };
}

codes! {
    BadRequest = 1001, Invalid, "the request is malformed",
        "A field is missing, out of range or contradicts another.",
        "Read the message: it names the field. Mend the caller.";
    UnknownBinding = 1002, NotFound, "the scope and slice are not registered",
        "The session names a binding this daemon has not seen, often after a restart.",
        "Register scope and slice again; the client crate does so by itself.";
    WrongLength = 1003, Invalid, "the length does not fit the binding",
        "A block was offered with another length than its scope and slice were registered with.",
        "Store whole blocks; register another slice for another length.";
    BatchTooLarge = 1004, Invalid, "too many keys in one request",
        "A request carried more keys or bytes than the daemon takes at once.",
        "Split the request; the message names the limit.";
    UnknownSession = 1005, Fenced, "the session is not known",
        "The session ended, or belongs to an earlier life of the daemon.",
        "Connect again. Leases of the old session are void.";
    WrongEpoch = 1006, Fenced, "the epoch is over",
        "The daemon restarted since the caller's session began.",
        "Connect and register again; the client crate does so by itself.";
    UnknownLease = 1007, LeaseExpired, "the lease is not known",
        "It was released, expired, or belonged to another session.",
        "Acquire the block again.";
    NotReserved = 1008, NotFound, "the block was not reserved",
        "A commit or abort named a block that this session does not hold reserved.",
        "Reserve first; a reservation ends with its session or its deadline.";
    AlreadyReserved = 1009, Busy, "another session is storing this block",
        "The block is announced by somebody else and has not arrived.",
        "Wait for it instead of storing it again.";
    Denied = 1010, Denied, "the caller may not do that",
        "The user id or certificate is not allowed this operation.",
        "Allow it in the configuration: `workers.uids` for workers, `listen.admin_uids` for administration.";
    Version = 1011, Unsupported, "the protocol versions do not meet",
        "Client and daemon share no version of the worker protocol.",
        "Upgrade the older side.";
    DeadlinePassed = 1012, Timeout, "the deadline passed",
        "The operation did not finish in the time the caller gave it, and was ended.",
        "Recompute, or allow more time.";
    StagingRange = 1013, Invalid, "the staging range is not the session's",
        "An offset or length leaves the session's staging area or is not aligned.",
        "Mend the caller; use the client crate's staging slots.";
    UnknownTenant = 1014, NotFound, "no such tenant",
        "No block or quota of that tenant is known here.",
        "List tenants with `kvctl get tenants`.";
    BadHandle = 1015, Invalid, "a handle of device memory or of an event cannot be used",
        "It leads nowhere, its owner is gone, it is of another device, or what lies behind is shorter than was said.",
        "Read the message. The worker exports the handle anew, from the process that has the memory.";
    UnknownCache = 1016, NotFound, "the KV cache is not registered",
        "The session named a cache that it has not registered, or has forgotten, often after a restart.",
        "Register it again; the client crate does so by itself.";

    CorruptHost = 2001, Corrupt, "a block in host memory failed its checksum",
        "Memory kept from an earlier life of the daemon, or damaged since, is not what was sealed.",
        "Nothing was served. Look at the machine's memory errors if it comes again.";
    CorruptDisk = 2002, Corrupt, "a block on disk failed its checksum",
        "The bytes read are not what was sealed under that name: damage, a torn or a misdirected write.",
        "Nothing was served and the block is quarantined. Check the device if it comes again.";
    SetAside = 2003, Unavailable, "a data directory or memory file was set aside",
        "It has another format version or is broken. It was renamed, not deleted.",
        "Run the version that wrote it, or remove the renamed files when they are not wanted.";
    CorruptTransfer = 2004, Corrupt, "a block was damaged on its way from a GPU",
        "Its checksum in host memory is not the one that the device computed of it: the bus or memory changed a byte.",
        "Nothing was stored. Look at the kernel log for PCIe and ECC errors, and take the device out if it comes again.";

    TierDegraded = 3001, Unavailable, "a tier is out of service",
        "Repeated errors or slowness opened its circuit; requests miss instead of waiting.",
        "It is probed and heals by itself. See the last error in `kvctl describe tier`.";
    DiskFull = 3002, Full, "the disk tier has no space",
        "The file system refused another segment.",
        "Free space or lower `disk.bytes_max`. Existing segments are reused meanwhile.";
    DiskError = 3003, Unavailable, "the disk tier reported an I/O error",
        "The kernel failed a read or a write.",
        "See the kernel log. Blocks on the bad place become misses.";
    DiskSlow = 3004, Unavailable, "the disk tier is slower than its limit",
        "Operations took longer than `disk.slow_limit`.",
        "Look for other load on the device. The tier is bypassed until it answers in time.";
    HostShort = 3005, Full, "the host tier is smaller than configured",
        "While memory was being allocated its file system ran full: others use it as well.",
        "Make room as the warning in `kvctl status` says, then restart: it goes on where it stopped.";

    PeerDown = 3006, Unavailable, "a peer is down",
        "It cannot be reached, fell silent, or sent what it may not; its circuit is open and its blocks miss.",
        "It is tried again by itself. See `kvctl describe peer` for the last error, and the peer's own log.";
    GpuLost = 3007, Unavailable, "a GPU is lost to the daemon, or never ended a copy",
        "Its driver failed in a way from which this process does not come back, or a copy outlived every wait.",
        "Look for Xid in the kernel log and at `nvidia-smi`; when the GPU is well, restart kvd to have it back.";
    NoGpu = 3008, Unavailable, "no GPU can be used",
        "There is no CUDA driver, no device of that name, or `gpu.enabled` is off.",
        "See `kvctl get gpus` for the reason. Blocks still come and go through host memory.";
    GpuError = 3009, Unavailable, "a GPU failed an operation",
        "The CUDA driver refused or failed a call; the device is still there.",
        "Read the message for the driver's own words. Recompute what was not loaded or stored.";

    HostFull = 4001, Full, "no host slot can be freed",
        "Every slot is pinned, leased or being written.",
        "Unpin, release, or raise `host.bytes_max`.";
    QuotaFull = 4002, Full, "the tenant is at its quota",
        "The tenant's bytes, all pinned or in use, reach its quota.",
        "Evict or unpin blocks of the tenant, or raise its quota.";
    TooManySessions = 4003, Busy, "too many sessions",
        "The daemon serves as many workers as its limits allow.",
        "Close idle workers or raise `limits.sessions_max`.";
    TooManyLeases = 4004, Busy, "too many leases in one session",
        "The session holds as many blocks as it may.",
        "Release blocks, or raise `limits.leases_per_session_max`.";
    QueueFull = 4005, Busy, "a queue is full",
        "More is in flight than the daemon's budgets allow.",
        "Try again after the hint.";
    TooManyPins = 4006, Full, "too many pins",
        "The tenant's pinned bytes reach the limit.",
        "Unpin, or raise `limits.pinned_ratio_max`.";
    TooManyBindings = 4007, Full, "too many bindings",
        "As many scopes and slices were named since the daemon started as there are numbers for them.",
        "Restart the daemon: it keeps those that some block in memory or on disk is of, and forgets the others.";
    TooManyCaches = 4008, Busy, "too many KV caches in one session",
        "The session has registered as many as it may, or too many events or pieces of memory with them.",
        "Forget some, or raise `gpu.caches_max`.";

    Draining = 5001, Unavailable, "the daemon is draining",
        "It was told to stop and takes no new work.",
        "Wait for the next one, or recompute.";
    Unreachable = 5002, Unavailable, "the daemon cannot be reached",
        "Nothing answers on its socket.",
        "See whether kvd runs and whether the socket path is right (`kvctl doctor`).";
    Bug = 5003, Internal, "a defect in kvd",
        "Something happened that the code holds impossible.",
        "Recompute, and report the message.";
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KVD-{}", *self as u16)
    }
}

/// The text is not the name of a code.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("no code `{text}`; codes look like KVD-1001")]
pub struct UnknownCode {
    /// What was given.
    pub text: String,
}

impl Code {
    /// The code with this number.
    pub fn from_number(number: u16) -> Option<Self> {
        Self::ALL.iter().copied().find(|code| *code as u16 == number)
    }
}

impl FromStr for Code {
    type Err = UnknownCode;
    fn from_str(text: &str) -> Result<Self, UnknownCode> {
        let digits = text.trim().to_ascii_uppercase();
        let digits = digits.strip_prefix("KVD-").unwrap_or(&digits);
        let number = digits.parse().ok();
        number.and_then(Self::from_number).ok_or_else(|| UnknownCode { text: text.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_written_and_read_back() {
        for code in Code::ALL {
            assert_eq!(code.to_string().parse(), Ok(*code));
            assert!(!code.cause().is_empty() && !code.action().is_empty());
        }
        assert!("KVD-1".parse::<Code>().is_err());
    }

    #[test]
    fn numbers_are_unique_and_in_order() {
        assert!(Code::ALL.windows(2).all(|pair| pair[0] < pair[1]));
    }
}
