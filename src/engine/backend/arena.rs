//! One arena: a block of memory taken once and read through typed views.
