//! Indices in the allocator's lists. Each list has a type of indices of its own, so that the index of a policy finds no
//! gateway.

use std::marker::PhantomData;
use std::ops::{Index, IndexMut};

/// An index of an element in a list.
pub(super) trait ListIndex: Copy {
    /// The index of the element with this number, from 0.
    fn new(number: usize) -> Self;
    /// The number of the element.
    fn number(self) -> usize;
}

macro_rules! indices {
    ($($(#[$doc:meta])* $name:ident)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub(super) struct $name(u32);

        impl ListIndex for $name {
            fn new(number: usize) -> Self {
                $name(number as u32)
            }

            fn number(self) -> usize {
                self.0 as usize
            }
        }
    )*};
}

indices! {
    /// The index of a gateway, in the order of names.
    GatewayIndex
    /// The index of a policy, in the order of seniority.
    PolicyIndex
    /// The index of a request, in the order of the most senior policy of each.
    RequestIndex
    /// The index of an allocation, in the order in which they were made.
    AllocationIndex
}

/// A list whose elements are found by indices of the type `P`.
#[derive(Clone, Debug)]
pub(super) struct List<P, T> {
    all: Vec<T>,
    indices: PhantomData<P>,
}

impl<P: ListIndex, T> List<P, T> {
    pub(super) fn new() -> Self {
        List { all: Vec::new(), indices: PhantomData }
    }

    /// Adds an element, and returns its index.
    pub(super) fn push(&mut self, element: T) -> P {
        self.all.push(element);
        P::new(self.all.len() - 1)
    }

    /// The index that the next element is going to have.
    pub(super) fn end(&self) -> P {
        P::new(self.all.len())
    }

    pub(super) fn iter(&self) -> std::slice::Iter<'_, T> {
        self.all.iter()
    }

    pub(super) fn iter_mut(&mut self) -> std::slice::IterMut<'_, T> {
        self.all.iter_mut()
    }

    /// All indices, in order. The list may be changed meanwhile.
    pub(super) fn indices(&self) -> impl Iterator<Item = P> + use<P, T> {
        (0..self.all.len()).map(P::new)
    }

    /// All elements with their indices.
    pub(super) fn indexed(&self) -> impl Iterator<Item = (P, &T)> {
        self.all.iter().enumerate().map(|(number, element)| (P::new(number), element))
    }

    /// A list with the same indices, and an element made for each.
    pub(super) fn map<U>(&self, make: impl FnMut(&T) -> U) -> List<P, U> {
        self.all.iter().map(make).collect()
    }

    /// The elements with their indices.
    pub(super) fn into_indexed(self) -> impl Iterator<Item = (P, T)> {
        self.all.into_iter().enumerate().map(|(number, element)| (P::new(number), element))
    }
}

impl<P: ListIndex, T> Index<P> for List<P, T> {
    type Output = T;

    fn index(&self, index: P) -> &T {
        &self.all[index.number()]
    }
}

impl<P: ListIndex, T> IndexMut<P> for List<P, T> {
    fn index_mut(&mut self, index: P) -> &mut T {
        &mut self.all[index.number()]
    }
}

impl<P, T> FromIterator<T> for List<P, T> {
    fn from_iter<I: IntoIterator<Item = T>>(elements: I) -> Self {
        List { all: elements.into_iter().collect(), indices: PhantomData }
    }
}
