//! From documents to sequences of tokens.
