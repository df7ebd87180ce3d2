//! Host memory as both sides of the fence see it: slots, the shared catalog table, hazard slots.
