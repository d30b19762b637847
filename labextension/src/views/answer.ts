import type { StateOf, View } from '../view'

export const answerView: View<StateOf<'answer'>> = (state, { root }) => {
  root.textContent = state.type
  return { update: () => undefined, event: () => undefined, lost: () => undefined, cleanup: () => undefined }
}
