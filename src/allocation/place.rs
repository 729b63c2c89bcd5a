//! Places in the allocator's lists. Each list has a type of places of its own, so that the place of a policy finds no
//! gateway.

use std::marker::PhantomData;
use std::ops::{Index, IndexMut};

/// A place in a list.
pub(super) trait Place: Copy {
    /// The place of the element with this number, from 0.
    fn new(number: usize) -> Self;
    /// The number of the element.
    fn number(self) -> usize;
}

macro_rules! places {
    ($($(#[$doc:meta])* $name:ident)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub(super) struct $name(u32);

        impl Place for $name {
            fn new(number: usize) -> Self {
                $name(number as u32)
            }

            fn number(self) -> usize {
                self.0 as usize
            }
        }
    )*};
}

places! {
    /// The place of a gateway, in the order of names.
    GatewayPlace
    /// The place of a policy, in the order of seniority.
    PolicyPlace
    /// The place of a request, in the order of the most senior policy of each.
    RequestPlace
    /// The place of an allocation, in the order in which they were made.
    AllocationPlace
}

/// A list whose elements are found by places of the type `P`.
#[derive(Clone, Debug)]
pub(super) struct List<P, T> {
    all: Vec<T>,
    places: PhantomData<P>,
}

impl<P: Place, T> List<P, T> {
    pub(super) fn new() -> Self {
        List { all: Vec::new(), places: PhantomData }
    }

    /// Adds an element, and returns its place.
    pub(super) fn push(&mut self, element: T) -> P {
        self.all.push(element);
        P::new(self.all.len() - 1)
    }

    /// The place that the next element is going to have.
    pub(super) fn end(&self) -> P {
        P::new(self.all.len())
    }

    pub(super) fn iter(&self) -> std::slice::Iter<'_, T> {
        self.all.iter()
    }

    pub(super) fn iter_mut(&mut self) -> std::slice::IterMut<'_, T> {
        self.all.iter_mut()
    }

    /// All places, in order. The list may be changed meanwhile.
    pub(super) fn places(&self) -> impl Iterator<Item = P> + use<P, T> {
        (0..self.all.len()).map(P::new)
    }

    /// All elements with their places.
    pub(super) fn with_places(&self) -> impl Iterator<Item = (P, &T)> {
        self.all.iter().enumerate().map(|(number, element)| (P::new(number), element))
    }

    /// A list with the same places, and an element made for each.
    pub(super) fn map<U>(&self, make: impl FnMut(&T) -> U) -> List<P, U> {
        self.all.iter().map(make).collect()
    }

    /// The elements with their places.
    pub(super) fn into_places(self) -> impl Iterator<Item = (P, T)> {
        self.all.into_iter().enumerate().map(|(number, element)| (P::new(number), element))
    }
}

impl<P: Place, T> Index<P> for List<P, T> {
    type Output = T;

    fn index(&self, place: P) -> &T {
        &self.all[place.number()]
    }
}

impl<P: Place, T> IndexMut<P> for List<P, T> {
    fn index_mut(&mut self, place: P) -> &mut T {
        &mut self.all[place.number()]
    }
}

impl<P, T> FromIterator<T> for List<P, T> {
    fn from_iter<I: IntoIterator<Item = T>>(elements: I) -> Self {
        List { all: elements.into_iter().collect(), places: PhantomData }
    }
}
