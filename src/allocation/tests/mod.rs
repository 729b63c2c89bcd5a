mod addresses;
mod moves;
mod nodes;
mod properties;
mod refusals;
mod tenants;
