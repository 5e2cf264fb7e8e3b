//! One page of a list: where it starts, how long it is, whether more follows.

/// Which part of a list is wanted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Page {
    /// Id of the last row already seen; `None` starts at the beginning.
    pub after: Option<String>,
    /// Most rows to hand out.
    pub limit: u32,
    /// Which end comes first.
    pub order: Order,
}

/// Direction of a list.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Order {
    #[default]
    NewestFirst,
    OldestFirst,
}

/// Rows of one page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed<T> {
    pub rows: Vec<T>,
    /// True when the next page is not empty.
    pub has_more: bool,
}

impl Page {
    /// Rows to ask the database for: one beyond the limit shows whether more follows.
    pub(super) fn fetch(&self) -> i64 {
        i64::from(self.limit) + 1
    }

    /// Cuts off the row beyond the limit.
    pub(super) fn listed<T>(&self, mut rows: Vec<T>) -> Listed<T> {
        let limit = self.limit as usize;
        let has_more = rows.len() > limit;
        rows.truncate(limit);
        Listed { rows, has_more }
    }
}
