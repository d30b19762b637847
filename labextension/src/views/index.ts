/** The views by the type of their state. */

import type { Shown, Surroundings, View } from '../view'
import type { State } from '../wire'
import { answerView } from './answer/view'
import { jobView } from './job/view'
import { machineView } from './machine/view'
import { mapView } from './map/view'

const VIEWS = { map: mapView, machine: machineView, job: jobView, answer: answerView }

/** Show a state with the view that is made for it; nothing where there is none, or it fails. */
export function showState(state: State, surroundings: Surroundings): Shown<State> | undefined {
  try {
    return (VIEWS[state.type] as View<State> | undefined)?.(state, surroundings) as Shown<State> | undefined
  } catch (error) {
    console.warn('llm_magic: a view failed; the notebook shows its static form', error)
    return undefined
  }
}
