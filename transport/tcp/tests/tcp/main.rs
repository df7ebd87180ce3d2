//! The path as others see it: both ends in one process, and now and then a bare socket that behaves badly.

mod contract;
mod control;
mod hostile;
mod link;
mod secure;
mod support;
