//! What the device is using, and what becomes of it when the device does not say that it is done.

use std::sync::Arc;
use std::time::Duration;

use crate::Error;
use crate::device::Device;
use crate::memory::{DeviceMemory, Registered};
use crate::pieces::Place;
use crate::stream::until;

/// How long the device is waited for when a call failed, and when somebody drops what is under way.
pub(crate) const SETTLE: Duration = Duration::from_secs(10);

/// Registered host memory, with the devices that registered it; none where its context stays anyhow.
pub(crate) type Registrations = Vec<(Arc<Registered>, Option<Device>)>;

/// Memory that belongs to a copy until the device is done with it.
pub(crate) struct InUse<H> {
    pub(crate) devices: Vec<DeviceMemory>,
    pub(crate) registered: Registrations,
    pub(crate) hosts: H,
}

impl<H: Send + 'static> InUse<H> {
    /// The device may be using it until its context is gone. `handles` are the streams, events and the like of the
    /// copy, which have the device among them; the hosts do not.
    pub(crate) fn keep<T>(self, device: &Device, handles: T) {
        let Self { devices, registered, hosts } = self;
        if device.lost().is_none() {
            // Not lost, only slow beyond measure. To close, free or unregister what it uses would be worse than to
            // lose it, and as the device is held by these, its context stays too.
            std::mem::forget((handles, devices, registered, hosts));
            return;
        }
        // What it may still write to on another device cannot be kept by its own.
        let elsewhere = |memory: &DeviceMemory| !Arc::ptr_eq(&memory.device().inner, &device.inner);
        devices.into_iter().filter(elsewhere).for_each(std::mem::forget);
        let registered: Vec<_> = registered.into_iter().map(|(registered, _)| registered).collect();
        device.inner.keep(Box::new((hosts, registered)));
    }
}

/// The registrations that cover these host memories, each once; or which host has none.
pub(crate) fn registrations(device: &Device, places: &[Place]) -> Result<Registrations, Error> {
    let mut found = Registrations::new();
    for (host, (address, bytes)) in places.iter().enumerate() {
        let (address, bytes) = (*address as usize, *bytes as usize);
        if found.last().is_some_and(|(last, _)| last.covers(address, bytes)) {
            continue;
        }
        let registration = device.driver().calls.registry.find(address, bytes);
        let missing = || Error::NotRegistered { device: device.facts().ordinal, host };
        let registration = registration.ok_or_else(missing)?;
        if !found.iter().any(|(known, _)| Arc::ptr_eq(known, &registration.0)) {
            found.push(registration);
        }
    }
    Ok(found)
}

/// Whether the device says in good time that it is done. A question that fails is asked again, unless it is lost.
pub(crate) fn settles(mut is_done: impl FnMut() -> Result<bool, Error>) -> bool {
    let is_done = || match is_done() {
        Err(Error::Cuda { .. }) => Ok(false),
        answer => answer,
    };
    matches!(until(SETTLE, is_done), Ok(true))
}
