mod addresses;
mod moves;
mod nodes;
mod properties;
mod rejections;
mod services;
mod tenants;
mod unreached;
