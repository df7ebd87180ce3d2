//! Lets go of what workers shared: a thread for each device, for the driver may take as long over it as the device has
//! anything to do, and whoever had it last must not wait.

use std::sync::Arc;
use std::sync::mpsc::{self, Sender};

use kv_gpu::{DeviceMemory, Event};
use tokio::sync::oneshot;

/// What is let go, and who is told when it is.
#[derive(Default)]
pub struct Closing {
    /// Memory of a worker.
    pub tensors: Vec<DeviceMemory>,
    /// Its events.
    pub events: Vec<Arc<Event>>,
    /// Who waits for that.
    pub told: Vec<oneshot::Sender<()>>,
}

/// Where to leave it. The thread ends with the last of these.
pub fn start(ordinal: u32) -> std::io::Result<Sender<Closing>> {
    let (door, work) = mpsc::channel::<Closing>();
    std::thread::Builder::new().name(format!("gpu-close-{ordinal}")).spawn(move || {
        for Closing { tensors, events, told } in work {
            drop((tensors, events));
            for told in told {
                let _ = told.send(());
            }
        }
    })?;
    Ok(door)
}
