/** The views by the type of their state. */

import type { Shown, Surroundings } from '../view'
import type { State } from '../wire'
import { answerView } from './answer'
import { jobView } from './job'
import { machineView } from './machine'
import { mapView } from './map'

/** Show a state with the view that is made for it. */
export function showState(state: State, surroundings: Surroundings): Shown<State> {
  switch (state.type) {
    case 'map':
      return mapView(state, surroundings) as Shown<State>
    case 'machine':
      return machineView(state, surroundings) as Shown<State>
    case 'job':
      return jobView(state, surroundings) as Shown<State>
    case 'answer':
      return answerView(state, surroundings) as Shown<State>
  }
}
