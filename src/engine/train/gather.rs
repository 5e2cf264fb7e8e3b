//! Parameters from the ranks that own them to rank 0, a piece at a time.
//!
//! A piece travels between two regions of the device that hold nothing between steps, so it takes no memory that is not planned,
//! and works where only devices are connected. No rank runs ahead of rank 0 by more than a piece, so nothing piles up in host
//! memory while rank 0 writes.

use super::session::Session;
use crate::engine::{
    Result,
    backend::{Backend, DType, Split, Tensor},
    comm::Comm,
    model::{params::Named, share::Part},
};

/// Bytes of a piece at most.
const PIECE_BYTES: u64 = 4 << 20;

/// Hands `sink` at rank 0 the bytes of a parameter, or of what belongs to it, in order. `flat` is each rank's weights or a part
/// of its state. Every rank calls this for the same parameters in the same order, between steps; the others' sinks get nothing.
pub(super) fn gather<B: Backend, C: Comm<B>>(
    session: &mut Session<B, C>,
    parameter: &Named,
    flat: Split,
    mut sink: impl FnMut(&[u8]) -> Result,
) -> Result {
    let dtype = flat.device.dtype;
    let room = session.free_between_steps().map(|room| room_for(dtype, room));
    let most = room.map_or(PIECE_BYTES / dtype.bytes(), |room| room.elements());
    let rank = session.groups.world.rank();
    let owners: Vec<(usize, Part)> = session.owners(parameter).collect();
    let mut bytes = Vec::new();
    for (owner, part) in owners {
        for start in (0..part.n).step_by(most as usize) {
            let (first, n) = (part.at + start, most.min(part.n - start));
            match room {
                Some(room) if owner != 0 => {
                    let places = (rank == owner).then(|| flat.rows(first, first + n));
                    let room = room.part(0, n);
                    send(session, owner, room, places.into_iter().flatten())?;
                    if rank == 0 {
                        hand_on(session, [room], &mut bytes, &mut sink)?;
                    }
                }
                _ if rank == 0 => hand_on(session, flat.rows(first, first + n), &mut bytes, &mut sink)?,
                _ => {}
            }
        }
    }
    Ok(())
}

/// As many elements of this type as a piece has, or as fit.
fn room_for(dtype: DType, room: Tensor) -> Tensor {
    let bytes = room.bytes().min(PIECE_BYTES);
    Tensor { dtype, rows: 1, cols: bytes / dtype.bytes(), ..room }
}

/// Brings what lies in `places` at the owner into the room at rank 0, through the owner's.
fn send<B: Backend, C: Comm<B>>(
    session: &mut Session<B, C>,
    owner: usize,
    room: Tensor,
    places: impl Iterator<Item = Tensor>,
) -> Result {
    let (b, world) = (&mut session.backend, &mut session.groups.world);
    let mut filled = 0;
    for place in places {
        let n = place.elements();
        b.copy(world.stream(), room.part(filled, n), place.part(0, n))?;
        filled += n;
    }
    let (rank, n_ranks) = (world.rank(), world.n_ranks());
    let only = |at: usize, here: bool| -> Vec<Tensor> {
        (0..n_ranks).map(|i| if here && i == at { room } else { room.part(0, 0) }).collect()
    };
    world.all_to_all(b, &only(owner, rank == 0), &only(0, rank == owner))
}

/// Reads tensors to the host, one after another.
fn hand_on<B: Backend, C: Comm<B>>(
    session: &mut Session<B, C>,
    places: impl IntoIterator<Item = Tensor>,
    bytes: &mut Vec<u8>,
    sink: &mut impl FnMut(&[u8]) -> Result,
) -> Result {
    session.backend.synchronize()?;
    session.groups.world.check()?;
    for place in places {
        bytes.resize(place.bytes() as usize, 0);
        session.backend.download(place, bytes)?;
        sink(bytes)?;
    }
    Ok(())
}
