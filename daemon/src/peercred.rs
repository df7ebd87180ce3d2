//! Who calls, and what they may do. A caller on a Unix socket is known by what the kernel says of it; a caller
//! on TCP by the certificate that its connection was let in with. Nothing a caller says of itself counts.

use axum::http::Extensions;
use tonic::transport::server::{TcpConnectInfo, TlsConnectInfo, UdsConnectInfo};

use crate::config::Config;
use crate::config::units::UidRule;

/// Who is at the other end of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Caller {
    /// A process of this machine.
    Process {
        /// Its user.
        uid: u32,
        /// Its number, where the kernel tells.
        pid: Option<u32>,
    },
    /// Somebody whom the TCP listener let in: by certificate, or by `listen.insecure`.
    Network,
    /// Nobody can tell.
    Unknown,
}

/// A caller, and what follows from who it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Who {
    /// Who calls.
    pub caller: Caller,
    /// What it may do.
    pub rights: Rights,
    /// The principal it belongs to.
    pub principal: usize,
}

impl Who {
    /// What follows from `config`, where the daemon runs as `own_uid`.
    pub fn new(caller: Caller, config: &Config, own_uid: u32) -> Self {
        Self { caller, rights: caller.rights(config, own_uid), principal: caller.principal(config) }
    }

    /// Nobody, who may do nothing.
    pub fn nobody() -> Self {
        Self { caller: Caller::Unknown, rights: Rights::default(), principal: 0 }
    }
}

/// What a caller may do. Nothing by default.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Rights {
    /// Store, read, pin, subscribe.
    pub blocks: bool,
    /// Fill arena slots in place.
    pub in_place: bool,
    /// Administer: drain, purge, quotas, verify.
    pub admin: bool,
}

impl Caller {
    /// Who is at the other end, from what the listener knows of the connection.
    pub fn of(known: &Extensions) -> Self {
        if let Some(peer) = known.get::<UdsConnectInfo>() {
            return peer.peer_cred.map_or(Self::Unknown, |cred| Self::Process {
                uid: cred.uid(),
                pid: cred.pid().and_then(|pid| u32::try_from(pid).ok()),
            });
        }
        let over_tcp = known.get::<TcpConnectInfo>().is_some()
            || known.get::<TlsConnectInfo<TcpConnectInfo>>().is_some();
        if over_tcp { Self::Network } else { Self::Unknown }
    }

    /// Whether `self` may use what `owner` opened: a process by its user, a caller over TCP by being one (what
    /// it must know besides is a number that cannot be guessed).
    pub fn may_use_what_is_of(self, owner: Self) -> bool {
        match (self, owner) {
            (Self::Process { uid, .. }, Self::Process { uid: of, .. }) => uid == of,
            (Self::Network, Self::Network) => true,
            _ => false,
        }
    }

    /// Its user id, where there is one.
    pub fn uid(self) -> Option<u32> {
        match self {
            Self::Process { uid, .. } => Some(uid),
            Self::Network | Self::Unknown => None,
        }
    }

    /// Its process id, 0 when not known.
    pub fn pid(self) -> u32 {
        match self {
            Self::Process { pid, .. } => pid.unwrap_or(0),
            Self::Network | Self::Unknown => 0,
        }
    }

    /// The principal it belongs to, by its place among [`Config::principal_names`].
    pub fn principal(self, config: &Config) -> usize {
        self.uid().and_then(|uid| config.principal_listing(uid)).unwrap_or(0)
    }

    /// What `config` lets this caller do, where the daemon runs as `own_uid`.
    pub fn rights(self, config: &Config, own_uid: u32) -> Rights {
        let Self::Process { uid, .. } = self else {
            return Rights { blocks: self == Self::Network, ..Rights::default() };
        };
        let listed = |rules: &[UidRule]| {
            rules.iter().any(|rule| match rule {
                UidRule::Own => uid == own_uid,
                UidRule::Any => true,
                UidRule::Uid(listed) => uid == *listed,
            })
        };
        // The LMCache door is a worker inside the daemon, whose own memory this is.
        let ourselves = self.pid() == std::process::id();
        let blocks =
            uid == 0 || ourselves || listed(&config.workers.uids) || config.principal_listing(uid).is_some();
        Rights {
            blocks,
            in_place: ourselves || (blocks && listed(&config.workers.trusted_uids)),
            admin: uid == 0 || listed(&config.listen.admin_uids),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rights_follow_from_who_calls() {
        let mut config = Config::default();
        config.workers.uids = vec![UidRule::Own, UidRule::Uid(7)];
        config.workers.trusted_uids = vec![UidRule::Uid(7), UidRule::Uid(8)];
        let user = |uid| Caller::Process { uid, pid: None };
        let rows = [
            (user(0), (true, false, true)),
            (user(5), (true, false, true)),
            (user(7), (true, true, false)),
            (user(8), (false, false, false)),
            (Caller::Network, (true, false, false)),
            (Caller::Unknown, (false, false, false)),
        ];
        for (caller, (blocks, in_place, admin)) in rows {
            assert_eq!(caller.rights(&config, 5), Rights { blocks, in_place, admin }, "{caller:?}");
        }
        let principal = crate::config::Principal { uids: vec![8, 9], ..Default::default() };
        config.principals.insert("b".into(), principal);
        let rows = [
            (user(0), true, 0),
            (user(7), true, 0),
            (user(8), true, 1),
            (user(9), true, 1),
            (user(10), false, 0),
            (Caller::Network, true, 0),
        ];
        for (caller, blocks, principal) in rows {
            let who = Who::new(caller, &config, 5);
            assert_eq!((who.rights.blocks, who.principal), (blocks, principal), "{caller:?}");
        }
        assert!(user(8).rights(&config, 5).in_place, "trusted, in the arena of its own principal");
        config.workers.uids = vec![UidRule::Any];
        config.listen.admin_uids = vec![];
        assert_eq!(user(9).rights(&config, 5), Rights { blocks: true, ..Rights::default() });
        assert!(!user(5).rights(&config, 5).admin, "an empty list leaves root alone");
        assert_eq!(Caller::of(&Extensions::new()), Caller::Unknown);
    }
}
