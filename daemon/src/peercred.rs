//! Who calls, and what they may do. A caller on a Unix socket is known by what the kernel says of it; a caller
//! on TCP by the certificate that its connection was let in with. Nothing a caller says of itself counts.

use tonic::transport::server::UdsConnectInfo;

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
    /// Who sent this gRPC request.
    pub fn of<T>(request: &tonic::Request<T>) -> Self {
        if let Some(peer) = request.extensions().get::<UdsConnectInfo>() {
            return peer.peer_cred.map_or(Self::Unknown, |cred| Self::Process {
                uid: cred.uid(),
                pid: cred.pid().and_then(|pid| u32::try_from(pid).ok()),
            });
        }
        // Known for TCP with and without TLS.
        if request.remote_addr().is_some() { Self::Network } else { Self::Unknown }
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
        let blocks = uid == 0 || listed(&config.workers.uids);
        Rights {
            blocks,
            in_place: blocks && listed(&config.workers.trusted_uids),
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
        config.workers.uids = vec![UidRule::Any];
        config.listen.admin_uids = vec![];
        assert_eq!(user(9).rights(&config, 5), Rights { blocks: true, ..Rights::default() });
        assert!(!user(5).rights(&config, 5).admin, "an empty list leaves root alone");
        assert_eq!(Caller::of(&tonic::Request::new(())), Caller::Unknown);
    }
}
