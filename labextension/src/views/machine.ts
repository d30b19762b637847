import type { StateOf, View } from '../view'

export const machineView: View<StateOf<'machine'>> = (state, { root }) => {
  root.textContent = state.type
  return { update: () => undefined, event: () => undefined, lost: () => undefined, cleanup: () => undefined }
}
