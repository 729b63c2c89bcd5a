mod addresses;
mod moves;
mod nodes;
mod properties;
mod rejections;
mod tenants;
mod unreached;
