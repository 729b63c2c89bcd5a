mod addresses;
mod nodes;
mod properties;
mod refusals;
