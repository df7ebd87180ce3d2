//! libibverbs, as far as we use it: structures, numbers, and the functions that are looked up at run time.
//!
//! Written after `infiniband/verbs.h` of rdma-core 44 (Debian's libibverbs-dev 44.0), whose ABI has not changed
//! since rdma-core 17. A test compares every size and offset with what a C compiler makes of the headers, where
//! they are installed. The headers are under a choice of GPL 2 or this licence, which we take:
//!
//! > Copyright (c) 2004, 2005 Topspin Communications. All rights reserved.
//! > Copyright (c) 2004, 2011-2012 Intel Corporation. All rights reserved.
//! > Copyright (c) 2005, 2006, 2007 Cisco Systems, Inc. All rights reserved.
//! > Copyright (c) 2005 PathScale, Inc. All rights reserved.
//! > Copyright (c) 2020 Intel Corporation. All rights reserved.
//! >
//! > Redistribution and use in source and binary forms, with or without modification, are permitted provided that
//! > the following conditions are met:
//! >
//! > - Redistributions of source code must retain the above copyright notice, this list of conditions and the
//! >   following disclaimer.
//! > - Redistributions in binary form must reproduce the above copyright notice, this list of conditions and the
//! >   following disclaimer in the documentation and/or other materials provided with the distribution.
//! >
//! > THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED
//! > TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL
//! > THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF
//! > CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER
//! > DEALINGS IN THE SOFTWARE.
//!
//! The library is never linked: a machine without it has no RDMA path, and that is all.

use std::ffi::{c_char, c_int, c_void};
use std::sync::OnceLock;

/// `struct ibv_device`
#[repr(C)]
pub(crate) struct Device {
    _ops: [*mut c_void; 2],
    pub(crate) node_type: c_int,
    pub(crate) transport_type: c_int,
    name: [c_char; 64],
    dev_name: [c_char; 64],
    dev_path: [c_char; 256],
    ibdev_path: [c_char; 256],
}

type Unused = Option<unsafe extern "C" fn()>;

/// `struct ibv_context_ops`
#[repr(C)]
pub(crate) struct ContextOps {
    _query_to_dereg: [Unused; 7],
    pub(crate) alloc_mw: Option<unsafe extern "C" fn(*mut Pd, c_int) -> *mut Mw>,
    _bind_mw: Unused,
    pub(crate) dealloc_mw: Option<unsafe extern "C" fn(*mut Mw) -> c_int>,
    _create_cq: Unused,
    pub(crate) poll_cq: Option<unsafe extern "C" fn(*mut Cq, c_int, *mut Wc) -> c_int>,
    pub(crate) req_notify_cq: Option<unsafe extern "C" fn(*mut Cq, c_int) -> c_int>,
    _event_to_srq: [Unused; 12],
    pub(crate) post_send: Option<unsafe extern "C" fn(*mut Qp, *mut SendWr, *mut *mut SendWr) -> c_int>,
    pub(crate) post_recv: Option<unsafe extern "C" fn(*mut Qp, *mut RecvWr, *mut *mut RecvWr) -> c_int>,
    _rest: [Unused; 5],
}

/// `struct ibv_context`
#[repr(C)]
pub(crate) struct Context {
    pub(crate) device: *mut Device,
    pub(crate) ops: ContextOps,
    pub(crate) cmd_fd: c_int,
    pub(crate) async_fd: c_int,
    pub(crate) num_comp_vectors: c_int,
    mutex: libc::pthread_mutex_t,
    abi_compat: *mut c_void,
}

/// `struct ibv_pd`
#[repr(C)]
pub(crate) struct Pd {
    pub(crate) context: *mut Context,
    handle: u32,
}

/// `struct ibv_mr`
#[repr(C)]
pub(crate) struct Mr {
    context: *mut Context,
    pd: *mut Pd,
    addr: *mut c_void,
    length: usize,
    handle: u32,
    pub(crate) lkey: u32,
    pub(crate) rkey: u32,
}

/// `struct ibv_mw`
#[repr(C)]
pub(crate) struct Mw {
    pub(crate) context: *mut Context,
    pd: *mut Pd,
    pub(crate) rkey: u32,
    handle: u32,
    kind: c_int,
}

/// `struct ibv_comp_channel`
#[repr(C)]
pub(crate) struct CompChannel {
    context: *mut Context,
    pub(crate) fd: c_int,
    refcnt: c_int,
}

/// `struct ibv_cq`, its beginning
#[repr(C)]
pub(crate) struct Cq {
    pub(crate) context: *mut Context,
    channel: *mut CompChannel,
    cq_context: *mut c_void,
    handle: u32,
    pub(crate) cqe: c_int,
}

/// `struct ibv_qp`, its beginning
#[repr(C)]
pub(crate) struct Qp {
    pub(crate) context: *mut Context,
    qp_context: *mut c_void,
    pd: *mut Pd,
    send_cq: *mut Cq,
    recv_cq: *mut Cq,
    srq: *mut c_void,
    handle: u32,
    pub(crate) qp_num: u32,
    state: c_int,
    qp_type: c_int,
}

/// `struct ibv_device_attr`
#[repr(C)]
#[derive(Clone)]
pub(crate) struct DeviceAttr {
    pub(crate) fw_ver: [c_char; 64],
    node_guid: u64,
    sys_image_guid: u64,
    pub(crate) max_mr_size: u64,
    page_size_cap: u64,
    vendor_id: u32,
    vendor_part_id: u32,
    hw_ver: u32,
    pub(crate) max_qp: c_int,
    pub(crate) max_qp_wr: c_int,
    pub(crate) device_cap_flags: u32,
    max_sge: c_int,
    max_sge_rd: c_int,
    max_cq: c_int,
    pub(crate) max_cqe: c_int,
    pub(crate) max_mr: c_int,
    max_pd: c_int,
    pub(crate) max_qp_rd_atom: c_int,
    max_ee_rd_atom: c_int,
    max_res_rd_atom: c_int,
    pub(crate) max_qp_init_rd_atom: c_int,
    max_ee_init_rd_atom: c_int,
    atomic_cap: c_int,
    max_ee: c_int,
    max_rdd: c_int,
    pub(crate) max_mw: c_int,
    max_raw_ipv6_qp: c_int,
    max_raw_ethy_qp: c_int,
    max_mcast_grp: c_int,
    max_mcast_qp_attach: c_int,
    max_total_mcast_qp_attach: c_int,
    max_ah: c_int,
    max_fmr: c_int,
    max_map_per_fmr: c_int,
    max_srq: c_int,
    max_srq_wr: c_int,
    max_srq_sge: c_int,
    max_pkeys: u16,
    local_ca_ack_delay: u8,
    phys_port_cnt: u8,
}

/// `struct ibv_port_attr`. The exported `ibv_query_port` writes all but the last field.
#[repr(C)]
#[derive(Clone)]
pub(crate) struct PortAttr {
    pub(crate) state: c_int,
    max_mtu: c_int,
    pub(crate) active_mtu: c_int,
    gid_tbl_len: c_int,
    port_cap_flags: u32,
    pub(crate) max_msg_sz: u32,
    bad_pkey_cntr: u32,
    qkey_viol_cntr: u32,
    pkey_tbl_len: u16,
    pub(crate) lid: u16,
    sm_lid: u16,
    lmc: u8,
    max_vl_num: u8,
    sm_sl: u8,
    subnet_timeout: u8,
    init_type_reply: u8,
    active_width: u8,
    active_speed: u8,
    phys_state: u8,
    pub(crate) link_layer: u8,
    flags: u8,
    port_cap_flags2: u16,
}

/// `struct ibv_qp_cap`
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct QpCap {
    pub(crate) max_send_wr: u32,
    pub(crate) max_recv_wr: u32,
    pub(crate) max_send_sge: u32,
    pub(crate) max_recv_sge: u32,
    pub(crate) max_inline_data: u32,
}

/// `struct ibv_qp_init_attr`
#[repr(C)]
pub(crate) struct QpInitAttr {
    pub(crate) qp_context: *mut c_void,
    pub(crate) send_cq: *mut Cq,
    pub(crate) recv_cq: *mut Cq,
    pub(crate) srq: *mut c_void,
    pub(crate) cap: QpCap,
    pub(crate) qp_type: c_int,
    pub(crate) sq_sig_all: c_int,
}

/// `struct ibv_global_route`
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct GlobalRoute {
    /// `union ibv_gid`, which is aligned as its `u64` halves.
    pub(crate) dgid: Gid,
    pub(crate) flow_label: u32,
    pub(crate) sgid_index: u8,
    pub(crate) hop_limit: u8,
    pub(crate) traffic_class: u8,
}

/// `union ibv_gid`
#[repr(C, align(8))]
#[derive(Clone, Copy)]
pub(crate) struct Gid(pub(crate) [u8; 16]);

/// `struct ibv_ah_attr`
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct AhAttr {
    pub(crate) grh: GlobalRoute,
    pub(crate) dlid: u16,
    pub(crate) sl: u8,
    pub(crate) src_path_bits: u8,
    pub(crate) static_rate: u8,
    pub(crate) is_global: u8,
    pub(crate) port_num: u8,
}

/// `struct ibv_qp_attr`
#[repr(C)]
pub(crate) struct QpAttr {
    pub(crate) qp_state: c_int,
    cur_qp_state: c_int,
    pub(crate) path_mtu: c_int,
    path_mig_state: c_int,
    qkey: u32,
    pub(crate) rq_psn: u32,
    pub(crate) sq_psn: u32,
    pub(crate) dest_qp_num: u32,
    pub(crate) qp_access_flags: u32,
    cap: QpCap,
    pub(crate) ah_attr: AhAttr,
    alt_ah_attr: AhAttr,
    pub(crate) pkey_index: u16,
    alt_pkey_index: u16,
    en_sqd_async_notify: u8,
    sq_draining: u8,
    pub(crate) max_rd_atomic: u8,
    pub(crate) max_dest_rd_atomic: u8,
    pub(crate) min_rnr_timer: u8,
    pub(crate) port_num: u8,
    pub(crate) timeout: u8,
    pub(crate) retry_cnt: u8,
    pub(crate) rnr_retry: u8,
    alt_port_num: u8,
    alt_timeout: u8,
    rate_limit: u32,
}

/// `struct ibv_sge`
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Sge {
    pub(crate) addr: u64,
    pub(crate) length: u32,
    pub(crate) lkey: u32,
}

/// The member `wr.rdma` of `struct ibv_send_wr`, with the room of the longest member of that union.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct RdmaWr {
    pub(crate) remote_addr: u64,
    pub(crate) rkey: u32,
    _longest: [u32; 5],
}

/// `struct ibv_mw_bind_info`
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct MwBindInfo {
    pub(crate) mr: *mut Mr,
    pub(crate) addr: u64,
    pub(crate) length: u64,
    pub(crate) mw_access_flags: u32,
}

/// The member `bind_mw` of `struct ibv_send_wr`, the longest of its union.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct BindWr {
    pub(crate) mw: *mut Mw,
    pub(crate) rkey: u32,
    pub(crate) bind_info: MwBindInfo,
}

/// `struct ibv_send_wr`
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct SendWr {
    pub(crate) wr_id: u64,
    pub(crate) next: *mut SendWr,
    pub(crate) sg_list: *mut Sge,
    pub(crate) num_sge: c_int,
    pub(crate) opcode: c_int,
    pub(crate) send_flags: u32,
    /// In network byte order; or the key to invalidate, in ours.
    pub(crate) imm_or_key: u32,
    pub(crate) rdma: RdmaWr,
    _xrc: u32,
    pub(crate) bind_mw: BindWr,
}

/// `struct ibv_recv_wr`
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct RecvWr {
    pub(crate) wr_id: u64,
    pub(crate) next: *mut RecvWr,
    pub(crate) sg_list: *mut Sge,
    pub(crate) num_sge: c_int,
}

/// `struct ibv_wc`. Only `wr_id`, `status`, `qp_num` and `vendor_err` mean something after a failure.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Wc {
    pub(crate) wr_id: u64,
    pub(crate) status: c_int,
    pub(crate) opcode: c_int,
    pub(crate) vendor_err: u32,
    pub(crate) byte_len: u32,
    /// In network byte order.
    pub(crate) imm_data: u32,
    qp_num: u32,
    src_qp: u32,
    pub(crate) wc_flags: u32,
    pkey_index: u16,
    slid: u16,
    sl: u8,
    dlid_path_bits: u8,
}

/// `struct ibv_async_event`
#[repr(C)]
pub(crate) struct AsyncEvent {
    /// A pointer, or a port number in its first bytes.
    pub(crate) element: *mut c_void,
    pub(crate) event_type: c_int,
}

macro_rules! zeroed {
    ($($name:ident),*) => {$(
        impl $name {
            /// All zero, as the functions want what they do not look at.
            pub(crate) fn zeroed() -> Self {
                // SAFETY: integers, pointers, and arrays and structs of these: zero is a value of each.
                unsafe { std::mem::zeroed() }
            }
        }
    )*};
}
zeroed!(DeviceAttr, PortAttr, QpAttr, SendWr, RecvWr, Wc, AsyncEvent);

pub(crate) const NODE_CA: c_int = 1;
pub(crate) const TRANSPORT_IB: c_int = 0;
pub(crate) const PORT_ACTIVE: c_int = 4;
pub(crate) const LINK_LAYER_ETHERNET: u8 = 2;
pub(crate) const CAP_MEM_WINDOW_TYPE_2A: u32 = 1 << 23;
pub(crate) const CAP_MEM_WINDOW_TYPE_2B: u32 = 1 << 24;
pub(crate) const ACCESS_LOCAL_WRITE: c_int = 1;
pub(crate) const ACCESS_REMOTE_READ: c_int = 1 << 2;
pub(crate) const ACCESS_MW_BIND: c_int = 1 << 4;
pub(crate) const MW_TYPE_2: c_int = 2;
pub(crate) const QPT_RC: c_int = 2;
pub(crate) const QPS_INIT: c_int = 1;
pub(crate) const QPS_RTR: c_int = 2;
pub(crate) const QPS_RTS: c_int = 3;
pub(crate) const QPS_ERR: c_int = 6;
pub(crate) const QP_STATE: c_int = 1;
pub(crate) const QP_ACCESS_FLAGS: c_int = 1 << 3;
pub(crate) const QP_PKEY_INDEX: c_int = 1 << 4;
pub(crate) const QP_PORT: c_int = 1 << 5;
pub(crate) const QP_AV: c_int = 1 << 7;
pub(crate) const QP_PATH_MTU: c_int = 1 << 8;
pub(crate) const QP_TIMEOUT: c_int = 1 << 9;
pub(crate) const QP_RETRY_CNT: c_int = 1 << 10;
pub(crate) const QP_RNR_RETRY: c_int = 1 << 11;
pub(crate) const QP_RQ_PSN: c_int = 1 << 12;
pub(crate) const QP_MAX_QP_RD_ATOMIC: c_int = 1 << 13;
pub(crate) const QP_MIN_RNR_TIMER: c_int = 1 << 15;
pub(crate) const QP_SQ_PSN: c_int = 1 << 16;
pub(crate) const QP_MAX_DEST_RD_ATOMIC: c_int = 1 << 17;
pub(crate) const QP_DEST_QPN: c_int = 1 << 20;
pub(crate) const WR_SEND_WITH_IMM: c_int = 3;
pub(crate) const WR_RDMA_READ: c_int = 4;
pub(crate) const WR_LOCAL_INV: c_int = 7;
pub(crate) const WR_BIND_MW: c_int = 8;
pub(crate) const SEND_SIGNALED: u32 = 1 << 1;
pub(crate) const WC_SUCCESS: c_int = 0;
pub(crate) const WC_WR_FLUSH_ERR: c_int = 5;
pub(crate) const WC_REM_ACCESS_ERR: c_int = 10;
pub(crate) const EVENT_DEVICE_FATAL: c_int = 8;
pub(crate) const EVENT_PORT_ACTIVE: c_int = 9;
pub(crate) const EVENT_PORT_ERR: c_int = 10;

macro_rules! library {
    ($($name:ident: $kind:ty,)*) => {
        /// The functions of libibverbs. The hot ones are not here: they are called through the context.
        pub(crate) struct Library {
            $(pub(crate) $name: $kind,)*
            /// `None` before rdma-core 34.
            pub(crate) ibv_reg_dmabuf_mr:
                Option<unsafe extern "C" fn(*mut Pd, u64, usize, u64, c_int, c_int) -> *mut Mr>,
        }

        impl Library {
            fn find(loaded: &'static libloading::Library) -> Result<Self, libloading::Error> {
                // SAFETY: the types are those of the headers for these names (see the module's comment); the
                // library is never unloaded, so the functions stay.
                unsafe {
                    Ok(Self {
                        $($name: *loaded.get(concat!(stringify!($name), "\0"))?,)*
                        ibv_reg_dmabuf_mr: loaded.get("ibv_reg_dmabuf_mr\0").ok().map(|symbol| *symbol),
                    })
                }
            }
        }
    };
}

library! {
    ibv_get_device_list: unsafe extern "C" fn(*mut c_int) -> *mut *mut Device,
    ibv_free_device_list: unsafe extern "C" fn(*mut *mut Device),
    ibv_get_device_name: unsafe extern "C" fn(*mut Device) -> *const c_char,
    ibv_open_device: unsafe extern "C" fn(*mut Device) -> *mut Context,
    ibv_close_device: unsafe extern "C" fn(*mut Context) -> c_int,
    ibv_query_device: unsafe extern "C" fn(*mut Context, *mut DeviceAttr) -> c_int,
    ibv_query_port: unsafe extern "C" fn(*mut Context, u8, *mut PortAttr) -> c_int,
    ibv_get_async_event: unsafe extern "C" fn(*mut Context, *mut AsyncEvent) -> c_int,
    ibv_ack_async_event: unsafe extern "C" fn(*mut AsyncEvent),
    ibv_alloc_pd: unsafe extern "C" fn(*mut Context) -> *mut Pd,
    ibv_dealloc_pd: unsafe extern "C" fn(*mut Pd) -> c_int,
    ibv_reg_mr_iova2: unsafe extern "C" fn(*mut Pd, *mut c_void, usize, u64, u32) -> *mut Mr,
    ibv_dereg_mr: unsafe extern "C" fn(*mut Mr) -> c_int,
    ibv_create_comp_channel: unsafe extern "C" fn(*mut Context) -> *mut CompChannel,
    ibv_destroy_comp_channel: unsafe extern "C" fn(*mut CompChannel) -> c_int,
    ibv_create_cq:
        unsafe extern "C" fn(*mut Context, c_int, *mut c_void, *mut CompChannel, c_int) -> *mut Cq,
    ibv_destroy_cq: unsafe extern "C" fn(*mut Cq) -> c_int,
    ibv_get_cq_event: unsafe extern "C" fn(*mut CompChannel, *mut *mut Cq, *mut *mut c_void) -> c_int,
    ibv_ack_cq_events: unsafe extern "C" fn(*mut Cq, u32),
    ibv_create_qp: unsafe extern "C" fn(*mut Pd, *mut QpInitAttr) -> *mut Qp,
    ibv_modify_qp: unsafe extern "C" fn(*mut Qp, *mut QpAttr, c_int) -> c_int,
    ibv_destroy_qp: unsafe extern "C" fn(*mut Qp) -> c_int,
    ibv_wc_status_str: unsafe extern "C" fn(c_int) -> *const c_char,
    ibv_event_type_str: unsafe extern "C" fn(c_int) -> *const c_char,
}

/// Name under which every rdma-core of the last ten years installs itself.
pub(crate) const LIBRARY: &str = "libibverbs.so.1";

/// The library; an error says in words why there is none. Loaded once and kept: its providers have state of
/// their own that an unload would leave dangling.
pub(crate) fn library() -> Result<&'static Library, &'static str> {
    static LOADED: OnceLock<Result<Library, String>> = OnceLock::new();
    let load = || {
        // SAFETY: its initialisers register drivers and touch nothing of ours.
        let loaded = unsafe { libloading::Library::new(LIBRARY) }.map_err(|error| error.to_string())?;
        let loaded: &'static libloading::Library = Box::leak(Box::new(loaded));
        Library::find(loaded).map_err(|error| format!("{LIBRARY} is too old: {error}"))
    };
    LOADED.get_or_init(load).as_ref().map_err(String::as_str)
}

#[cfg(test)]
mod tests {
    use std::mem::{offset_of, size_of};
    use std::process::Command;

    use super::*;

    /// One line of the table: what C calls it, what the compiler of rdma-core 44 on x86-64 says, what ours says.
    struct Line {
        c: String,
        wanted: usize,
        ours: usize,
    }

    macro_rules! layouts {
        ($($ours:ident $c:literal $size:expr, { $($field:ident$(.$inner:ident)* $c_field:literal $at:expr),* })*) => {{
            let mut lines = Vec::new();
            $(
                if let Some(wanted) = $size {
                    lines.push(Line { c: format!("sizeof({})", $c), wanted, ours: size_of::<$ours>() });
                }
                $(lines.push(Line {
                    c: format!("offsetof({}, {})", $c, $c_field),
                    wanted: $at,
                    ours: offset_of!($ours, $field$(.$inner)*),
                });)*
            )*
            lines
        }};
    }

    #[rustfmt::skip]
    fn layouts() -> Vec<Line> {
        layouts! {
            Device "struct ibv_device" Some(664), { node_type "node_type" 16, transport_type "transport_type" 20,
                name "name" 24, ibdev_path "ibdev_path" 408 }
            ContextOps "struct ibv_context_ops" Some(256), { alloc_mw "alloc_mw" 56, dealloc_mw "dealloc_mw" 72,
                poll_cq "poll_cq" 88, req_notify_cq "req_notify_cq" 96, post_send "post_send" 200,
                post_recv "post_recv" 208 }
            Context "struct ibv_context" Some(328), { device "device" 0, ops "ops" 8, cmd_fd "cmd_fd" 264,
                async_fd "async_fd" 268, num_comp_vectors "num_comp_vectors" 272, mutex "mutex" 280,
                abi_compat "abi_compat" 320 }
            Pd "struct ibv_pd" Some(16), { context "context" 0, handle "handle" 8 }
            Mr "struct ibv_mr" Some(48), { addr "addr" 16, length "length" 24, lkey "lkey" 36, rkey "rkey" 40 }
            Mw "struct ibv_mw" Some(32), { context "context" 0, pd "pd" 8, rkey "rkey" 16, handle "handle" 20,
                kind "type" 24 }
            CompChannel "struct ibv_comp_channel" Some(16), { context "context" 0, fd "fd" 8, refcnt "refcnt" 12 }
            Cq "struct ibv_cq" None, { context "context" 0, channel "channel" 8, cq_context "cq_context" 16,
                handle "handle" 24, cqe "cqe" 28 }
            Qp "struct ibv_qp" None, { context "context" 0, pd "pd" 16, send_cq "send_cq" 24, handle "handle" 48,
                qp_num "qp_num" 52, state "state" 56, qp_type "qp_type" 60 }
            DeviceAttr "struct ibv_device_attr" Some(232), { max_mr_size "max_mr_size" 80, max_qp "max_qp" 108,
                max_qp_wr "max_qp_wr" 112, device_cap_flags "device_cap_flags" 116, max_cqe "max_cqe" 132,
                max_mr "max_mr" 136, max_qp_rd_atom "max_qp_rd_atom" 144,
                max_qp_init_rd_atom "max_qp_init_rd_atom" 156, atomic_cap "atomic_cap" 164, max_mw "max_mw" 176,
                phys_port_cnt "phys_port_cnt" 227 }
            PortAttr "struct ibv_port_attr" Some(52), { state "state" 0, active_mtu "active_mtu" 8,
                max_msg_sz "max_msg_sz" 20, lid "lid" 34, link_layer "link_layer" 46, flags "flags" 47,
                port_cap_flags2 "port_cap_flags2" 48 }
            QpCap "struct ibv_qp_cap" Some(20), { max_send_wr "max_send_wr" 0, max_inline_data "max_inline_data" 16 }
            QpInitAttr "struct ibv_qp_init_attr" Some(64), { qp_context "qp_context" 0, send_cq "send_cq" 8,
                recv_cq "recv_cq" 16, srq "srq" 24, cap "cap" 32, qp_type "qp_type" 52, sq_sig_all "sq_sig_all" 56 }
            Gid "union ibv_gid" Some(16), {}
            GlobalRoute "struct ibv_global_route" Some(24), { dgid "dgid" 0, flow_label "flow_label" 16,
                sgid_index "sgid_index" 20, hop_limit "hop_limit" 21, traffic_class "traffic_class" 22 }
            AhAttr "struct ibv_ah_attr" Some(32), { grh "grh" 0, dlid "dlid" 24, sl "sl" 26,
                src_path_bits "src_path_bits" 27, static_rate "static_rate" 28, is_global "is_global" 29,
                port_num "port_num" 30 }
            QpAttr "struct ibv_qp_attr" Some(144), { qp_state "qp_state" 0, path_mtu "path_mtu" 8,
                rq_psn "rq_psn" 20, sq_psn "sq_psn" 24, dest_qp_num "dest_qp_num" 28,
                qp_access_flags "qp_access_flags" 32, cap "cap" 36, ah_attr "ah_attr" 56,
                pkey_index "pkey_index" 120, max_rd_atomic "max_rd_atomic" 126,
                max_dest_rd_atomic "max_dest_rd_atomic" 127, min_rnr_timer "min_rnr_timer" 128,
                port_num "port_num" 129, timeout "timeout" 130, retry_cnt "retry_cnt" 131,
                rnr_retry "rnr_retry" 132, rate_limit "rate_limit" 136 }
            Sge "struct ibv_sge" Some(16), { addr "addr" 0, length "length" 8, lkey "lkey" 12 }
            MwBindInfo "struct ibv_mw_bind_info" Some(32), { mr "mr" 0, addr "addr" 8, length "length" 16,
                mw_access_flags "mw_access_flags" 24 }
            SendWr "struct ibv_send_wr" Some(128), { wr_id "wr_id" 0, next "next" 8, sg_list "sg_list" 16,
                num_sge "num_sge" 24, opcode "opcode" 28, send_flags "send_flags" 32, imm_or_key "imm_data" 36,
                imm_or_key "invalidate_rkey" 36, rdma.remote_addr "wr.rdma.remote_addr" 40,
                rdma.rkey "wr.rdma.rkey" 48, _xrc "qp_type" 72, bind_mw.mw "bind_mw.mw" 80,
                bind_mw.rkey "bind_mw.rkey" 88, bind_mw.bind_info "bind_mw.bind_info" 96 }
            RecvWr "struct ibv_recv_wr" Some(32), { wr_id "wr_id" 0, next "next" 8, sg_list "sg_list" 16,
                num_sge "num_sge" 24 }
            Wc "struct ibv_wc" Some(48), { wr_id "wr_id" 0, status "status" 8, opcode "opcode" 12,
                vendor_err "vendor_err" 16, byte_len "byte_len" 20, imm_data "imm_data" 24, qp_num "qp_num" 28,
                wc_flags "wc_flags" 36, dlid_path_bits "dlid_path_bits" 45 }
            AsyncEvent "struct ibv_async_event" Some(16), { element "element" 0, event_type "event_type" 8 }
        }
    }

    #[rustfmt::skip]
    fn numbers() -> Vec<(&'static str, i64)> {
        macro_rules! numbers { ($($c:literal $ours:expr),*) => { vec![$(($c, i64::from($ours))),*] } }
        numbers! {
            "IBV_NODE_CA" NODE_CA, "IBV_TRANSPORT_IB" TRANSPORT_IB, "IBV_PORT_ACTIVE" PORT_ACTIVE,
            "IBV_LINK_LAYER_ETHERNET" LINK_LAYER_ETHERNET,
            "IBV_DEVICE_MEM_WINDOW_TYPE_2A" CAP_MEM_WINDOW_TYPE_2A,
            "IBV_DEVICE_MEM_WINDOW_TYPE_2B" CAP_MEM_WINDOW_TYPE_2B,
            "IBV_ACCESS_LOCAL_WRITE" ACCESS_LOCAL_WRITE, "IBV_ACCESS_REMOTE_READ" ACCESS_REMOTE_READ,
            "IBV_ACCESS_MW_BIND" ACCESS_MW_BIND, "IBV_MW_TYPE_2" MW_TYPE_2, "IBV_QPT_RC" QPT_RC,
            "IBV_QPS_INIT" QPS_INIT, "IBV_QPS_RTR" QPS_RTR, "IBV_QPS_RTS" QPS_RTS, "IBV_QPS_ERR" QPS_ERR,
            "IBV_QP_STATE" QP_STATE, "IBV_QP_ACCESS_FLAGS" QP_ACCESS_FLAGS, "IBV_QP_PKEY_INDEX" QP_PKEY_INDEX,
            "IBV_QP_PORT" QP_PORT, "IBV_QP_AV" QP_AV, "IBV_QP_PATH_MTU" QP_PATH_MTU, "IBV_QP_TIMEOUT" QP_TIMEOUT,
            "IBV_QP_RETRY_CNT" QP_RETRY_CNT, "IBV_QP_RNR_RETRY" QP_RNR_RETRY, "IBV_QP_RQ_PSN" QP_RQ_PSN,
            "IBV_QP_MAX_QP_RD_ATOMIC" QP_MAX_QP_RD_ATOMIC, "IBV_QP_MIN_RNR_TIMER" QP_MIN_RNR_TIMER,
            "IBV_QP_SQ_PSN" QP_SQ_PSN, "IBV_QP_MAX_DEST_RD_ATOMIC" QP_MAX_DEST_RD_ATOMIC,
            "IBV_QP_DEST_QPN" QP_DEST_QPN, "IBV_WR_SEND_WITH_IMM" WR_SEND_WITH_IMM,
            "IBV_WR_RDMA_READ" WR_RDMA_READ, "IBV_WR_LOCAL_INV" WR_LOCAL_INV, "IBV_WR_BIND_MW" WR_BIND_MW,
            "IBV_SEND_SIGNALED" SEND_SIGNALED, "IBV_WC_SUCCESS" WC_SUCCESS,
            "IBV_WC_WR_FLUSH_ERR" WC_WR_FLUSH_ERR, "IBV_WC_REM_ACCESS_ERR" WC_REM_ACCESS_ERR,
            "IBV_EVENT_DEVICE_FATAL" EVENT_DEVICE_FATAL, "IBV_EVENT_PORT_ACTIVE" EVENT_PORT_ACTIVE,
            "IBV_EVENT_PORT_ERR" EVENT_PORT_ERR
        }
    }

    #[test]
    #[cfg(target_pointer_width = "64")]
    fn structures_are_laid_out_as_the_c_compiler_does() {
        for line in layouts() {
            assert_eq!(line.ours, line.wanted, "{}", line.c);
        }
    }

    #[test]
    fn the_headers_of_this_machine_agree() {
        let dir = tempfile::tempdir().unwrap();
        let (source, program) = (dir.path().join("layout.c"), dir.path().join("layout"));
        let mut text = String::from(
            "#include <infiniband/verbs.h>\n#include <stddef.h>\n#include <stdio.h>\nint main(void) {\n",
        );
        let numbers = numbers();
        for expression in layouts().iter().map(|line| &*line.c).chain(numbers.iter().map(|(c, _)| *c)) {
            text += &format!("printf(\"%lld\\n\", (long long)({expression}));\n");
        }
        std::fs::write(&source, text + "return 0; }\n").unwrap();
        let compiled = Command::new("cc").arg("-o").arg(&program).arg(&source).output();
        let Some(compiled) = compiled.ok().filter(|compiled| {
            compiled.status.success() || {
                let said = String::from_utf8_lossy(&compiled.stderr).into_owned();
                assert!(said.contains("infiniband/verbs.h: No such file"), "{said}");
                false
            }
        }) else {
            eprintln!("skipped: no C compiler with infiniband/verbs.h (package libibverbs-dev) here");
            return;
        };
        drop(compiled);
        let said = Command::new(&program).output().unwrap();
        let found: Vec<i64> =
            String::from_utf8(said.stdout).unwrap().lines().map(|line| line.parse().unwrap()).collect();
        let ours = layouts().into_iter().map(|line| (line.c, line.ours as i64));
        let ours: Vec<_> = ours.chain(numbers.iter().map(|(c, ours)| ((*c).to_owned(), *ours))).collect();
        assert_eq!(found.len(), ours.len());
        for (found, (c, ours)) in found.into_iter().zip(ours) {
            assert_eq!(ours, found, "{c}");
        }
    }

    #[test]
    fn the_library_is_whole_or_said_to_be_missing() {
        match library() {
            Ok(_) => {}
            Err(why) => eprintln!("skipped: {why}"),
        }
    }
}
