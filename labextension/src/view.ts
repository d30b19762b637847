/** What a view is: a function of plain DOM that gets states and events, and sends commands. */

import type { Language, Translate } from './i18n'
import type { Command, Event, State } from './wire'

/** What a view may use. */
export interface Surroundings {
  /** Where the view puts its elements: an element inside of a shadow root, alone there. */
  root: HTMLElement
  /** Number of the view, for commands. */
  view: string
  language: Language
  t: Translate
  send: (command: Command) => void
}

/** A view that is shown. */
export interface Shown<S extends State> {
  /** A new state of the same kind. */
  update: (state: S) => void
  /** Something small happened. */
  event: (event: Event) => void
  /** The kernel is gone, or the model; the view says so and takes no more commands. */
  lost: (message: string) => void
  /** Take everything back: timers, listeners outside of `root`, frames. */
  cleanup: () => void
}

export type View<S extends State> = (state: S, surroundings: Surroundings) => Shown<S>

/** The state that a view of this type gets. */
export type StateOf<T extends State['type']> = Extract<State, { type: T }>
